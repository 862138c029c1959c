"""Publishes an adapter: samples a picture for its card, and uploads adapter, card and picture in one commit.

hf auth login
python examples/push_to_hub.py --adapter my_adapter --repo_id me/dit-food101 --license cc-by-nc-4.0
"""

import argparse

import torch
from accelerate import Accelerator
from difffit_peft import DiffFitDiTPipeline
from difffit_peft.publishing import check_push
from difffit_peft.training.arguments import add_sampling_arguments
from difffit_peft.training.scripts import non_negative_int, run_script, seed_int
from difffit_peft.training.visualize import label_rows, sample_grid


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="folder of the adapter")
    parser.add_argument("--repo_id", required=True, help="where it goes, user/name")
    parser.add_argument("--pretrained_model_name_or_path", help="folder or Hub id of the base; default: as it says")
    parser.add_argument("--private", action=argparse.BooleanOptionalAction, help="make the repository private")
    parser.add_argument("--revision", help="branch to upload to, made if need be; default: the main one")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request")
    parser.add_argument("--license", default="unknown", help="identifier of a licence, as the Hub knows it")
    parser.add_argument("--dataset", help="Hub id, or a few words")
    parser.add_argument("--labels", nargs="+", help="classes on the picture, by name or index; default: the first four")
    parser.add_argument("--num_images", type=non_negative_int, default=4, help="per class; 0: no picture")
    add_sampling_arguments(parser)
    parser.add_argument("--seed", type=seed_int, default=0)
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    check_push(args.repo_id, args.create_pr)
    base = args.pretrained_model_name_or_path or args.adapter
    pipe = DiffFitDiTPipeline.from_pretrained(base, dtype=torch.float32)
    if args.pretrained_model_name_or_path:
        pipe.load_difffit_weights(args.adapter)
    pipe.to(Accelerator().device)
    pipe.set_progress_bar_config(leave=False)
    picture = None
    if args.num_images > 0:
        known = pipe.id2label
        classes = pipe.get_label_ids(args.labels) if args.labels else [*known][:4] or [0]
        grid = sample_grid(
            pipe,
            classes,
            args.num_images,
            seed=args.seed,
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.num_inference_steps,
        )
        picture = label_rows(grid, [known.get(index, str(index)) for index in classes])
    commit = pipe.push_difffit_to_hub(
        args.repo_id,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        license=args.license,
        dataset=args.dataset,
        picture=picture,
    )
    print(commit.commit_url)


if __name__ == "__main__":
    run_script(main, parse_args)

"""Training on images: `images` become `latents`, of which each step of the `loop` (`sampling`, `objective`, `losses`) sees
a batch. A script's whole `run` is made of these."""

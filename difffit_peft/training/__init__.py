"""Training on images: `images` become `latents`, and each step of the `loop` trains on some of them (`sampling`,
`objective`, `losses`). A script's whole `run` is made of these."""

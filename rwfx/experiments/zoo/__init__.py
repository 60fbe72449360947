"""Every model of torchvision, one of each module of timm, architectures of Hugging Face: transformed and checked."""

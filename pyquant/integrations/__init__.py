"""Where pyquant meets other packages: transformers, datasets, safetensors. Nothing below this folder imports them."""

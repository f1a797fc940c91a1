"""Everything that touches transformers, safetensors or the disk: loading, training, evaluating, exporting."""

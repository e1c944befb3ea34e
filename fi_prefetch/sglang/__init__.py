"""SGLang serves with our kernel: the attention backend `fi_prefetch`, which `plugin.py` adds to SGLang's choices."""

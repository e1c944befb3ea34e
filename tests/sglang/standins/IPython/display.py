class HTML(str):
    """What SGLang names in an annotation."""


def display(*objects: object) -> None:
    """Would show objects in a notebook."""

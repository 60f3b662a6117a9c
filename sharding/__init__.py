"""Where a program runs: devices, and how its values are laid out over them."""

if __name__ != "jaxinfer.sharding":
    raise ImportError(
        f"this package is jaxinfer.sharding and must be imported as that, not as {__name__!r}: "
        "a second copy of its classes would not be equal to the first"
    )

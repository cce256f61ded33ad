"""The operations of gas_triton, one file each. Imported as ``gas_triton.kernels``."""

# Run from the repository root, `import kernels` would find this folder and hide the PyPI package of that
# name from libraries which use it where it is installed; an ImportError tells those that it is not.
if __name__ != "gas_triton.kernels":
    raise ImportError(
        f"this folder is part of gas_triton and is imported as gas_triton.kernels, not as {__name__!r}; "
        "for the PyPI package named kernels, start Python outside the gas_triton repository"
    )

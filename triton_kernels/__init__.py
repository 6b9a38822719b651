"""Triton twins of the per-element math in csrc/math.

The package is installed as `pymerge.triton_kernels`. A top-level `triton_kernels` belongs to
another project, so this one refuses to be imported under that name.
"""

if __name__ != "pymerge.triton_kernels":
    raise ImportError(
        f"imported as {__name__!r}, but this folder is the package 'pymerge.triton_kernels': "
        "import that, with pymerge installed (`pip install -e .` in a source tree). If you want "
        "the package 'triton_kernels' of another project, take pymerge's source folder off "
        "sys.path (it is there when Python starts inside it)."
    )

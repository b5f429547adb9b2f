"""What engineers of this package run: reports of the compilers on its kernels. Not in the wheel."""

"""The environment of tools that compute."""

# A training step allocates hundreds of megabytes. With small pages, the kernel would spend a quarter
# of the step on providing them.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

/* Exercises the C library without Python: every kernel family beside the scalar one, and whole
 * passes of small engines. All buffers end where their data end and start unaligned, so that
 * AddressSanitizer and valgrind see what is read beside or before it was written, and
 * ThreadSanitizer what two threads touch without a barrier between them;
 * tests/checked_library.py builds and runs it under each. Exits 1 at the first difference. */
#include "checks.h"

#include <stdio.h>

int main(void) {
    int n_families = 0;
    for (int i = 0; i < bn_kernel_count(); i++) {
        const char *name, *description;
        int available;
        require(!bn_kernel_info(i, &name, &description, &available), "kernel_info");
        if (!available) continue;
        check_kernels(name);
        printf("%s%s", n_families++ ? ", " : "kernels ", name);
    }
    check_engines();
    check_refusals();
    printf(": all checks passed\n");
    return 0;
}

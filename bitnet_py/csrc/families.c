#include "families.h"
#include "bitnet.h"
#include "error.h"

#include <string.h>

/* Best first, ends with scalar. */
static const bn_kernels *const families[] = {
#if defined(__x86_64__) && !defined(BN_SCALAR_ONLY)
#ifdef BN_HAVE_AMX
    &bn_kernels_amx,
#endif
    &bn_kernels_avx512vnni,
    &bn_kernels_avx2,
#endif
    &bn_kernels_scalar,
};
enum { N_FAMILIES = sizeof families / sizeof *families };

const bn_kernels *bn_select_kernels(const char *name) {
    for (int i = 0; i < N_FAMILIES; i++) {
        const bn_kernels *kernels = families[i];
        if (name && strcmp(name, kernels->name) != 0) continue;
        if (kernels->available()) return kernels;
        if (name) {
            bn_set_error("kernel '%s' needs %s, which this CPU or operating system does not offer", name,
                         kernels->description);
            return NULL;
        }
    }
    char known[128] = "";
    for (int i = 0; i < N_FAMILIES; i++) {
        strncat(known, i ? ", " : "", sizeof known - strlen(known) - 1);
        strncat(known, families[i]->name, sizeof known - strlen(known) - 1);
    }
    bn_set_error("unknown kernel '%s'; this build has %s", name ? name : "", known);
    return NULL;
}

int bn_kernel_count(void) { return N_FAMILIES; }

int bn_kernel_info(int index, const char **name, const char **description, int *available) {
    if (index < 0 || index >= N_FAMILIES) {
        bn_set_error("kernel index %d is outside 0..%d", index, N_FAMILIES - 1);
        return BN_ERR_ARGUMENT;
    }
    *name = families[index]->name;
    *description = families[index]->description;
    *available = families[index]->available();
    return BN_OK;
}

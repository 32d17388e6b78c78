/* The kernel families compiled in, and the choice among them. */
#ifndef BN_FAMILIES_H
#define BN_FAMILIES_H

#include "kernels.h"

/* The named family, or the best available for NULL; NULL (with the last error set) when it is
 * not available. */
const bn_kernels *bn_select_kernels(const char *name);

#endif

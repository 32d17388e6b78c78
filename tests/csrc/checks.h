/* What the checks share: buffers that end where their data end, numbers from one sequence, and a
 * way to fail. */
#ifndef BN_CHECKS_H
#define BN_CHECKS_H

#include "bitnet.h"

#include <stddef.h>
#include <stdint.h>

/* Ends the program with exit status 1 unless ok. */
void require(int ok, const char *what);

extern int n_held;
/* Room for exactly n items, `skew` items away from malloc's alignment; lives until release(). */
void *room(int64_t n, size_t item, int skew);
/* Frees all but the first `keep` buffers; n_held is their number. */
void release(int keep);

uint32_t random_bits(void);
/* low to high, both included */
int between(int low, int high);
/* centre - spread to centre + spread */
float *random_floats(int64_t n, float centre, float spread);
uint16_t *random_halves(int64_t n);
/* n_bytes bytes of four codes 0, 1 or 2 */
uint8_t *random_codes(int64_t n_bytes);

/* Sets sizes[i] to the floats that tap i of a pass takes, all layers' and then the model's; 0: it is not recorded.
 */
void tap_sizes(const bn_model *m, const bn_pass *p, int flash, int64_t *sizes);

/* All kernels of one family beside the scalar ones. */
void check_kernels(const char *family);
/* Whole passes of small engines: what comes out must not depend on threads and kernels. */
void check_engines(void);
/* What an engine refuses. */
void check_refusals(void);

#endif

/* Faults for tests: which one is selected, and where in the network the calling thread is. */
#ifndef ZOO_H
#define ZOO_H

#include "bitnet.h"
#include "zoo_faults.h" /* generated: enum of the faults, ZOO_FAULT_NAMES, ZOO_TAP_NAMES */

enum { ZOO_ANY = -2, ZOO_MODEL_WIDE = -1 };
enum { ZOO_PREFILL = 0, ZOO_DECODE = 1 };
/* Model-wide taps follow the layer taps. */
enum {
    ZOO_TAP_INP_EMBD = BN_LAYER_TAPS,
    ZOO_TAP_INP_SCALED,
    ZOO_TAP_RESULT_NORM,
    ZOO_TAP_RESULT_OUTPUT,
    ZOO_TAP_POOLED,
};

typedef struct {
    int32_t layer; /* ZOO_MODEL_WIDE outside the layers */
    int32_t op;    /* a BN_TAP_ or ZOO_TAP_ value */
    int32_t pass;  /* ZOO_PREFILL or ZOO_DECODE */
} zoo_place;

typedef struct {
    int32_t fault;
    zoo_place place; /* ZOO_ANY where it does not matter */
} zoo_selection;

extern zoo_selection zoo_selected;
extern _Thread_local zoo_place zoo_at;

static inline void zoo_enter(const bn_pass *pass, int32_t layer, int32_t op) {
    zoo_at = (zoo_place){layer, op, pass->n_tokens == 1 && pass->start > 0 ? ZOO_DECODE : ZOO_PREFILL};
}

static inline int zoo_is(int32_t wanted, int32_t here) { return wanted == ZOO_ANY || wanted == here; }

/* Whether this fault happens here. */
static inline int bn_fault(int32_t fault) {
    return zoo_selected.fault == fault && zoo_is(zoo_selected.place.layer, zoo_at.layer) &&
           zoo_is(zoo_selected.place.op, zoo_at.op) && zoo_is(zoo_selected.place.pass, zoo_at.pass);
}

/* Selects "NAME[:layer=N][:op=TAP][:pass=prefill|decode]", or nothing for "". Returns 0, or 1 if not understood.
 * The environment variable BN_FAULT is read once, when the library is loaded; nonsense there aborts. */
BN_API int bn_zoo_select(const char *text);

#endif

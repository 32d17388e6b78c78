/* One pass through the network. */
#ifndef BN_FORWARD_H
#define BN_FORWARD_H

#include "engine.h"

/* On validated arguments; buffers, rotary table and search are reserved. */
void bn_forward(bn_engine *engine, const bn_pass *pass);

#endif

/* GELU by its approximation with tanh, as ggml computes it: from a table. */
#ifndef BN_GELU_H
#define BN_GELU_H

/* Fills the table, the first time. Before anything calls the kernel bn_gated_gelu (kernels.h). */
void bn_gelu_prepare(void);

#endif

/* What the CPU supports and the operating system saves (XCR0), queried once. */
#ifndef BN_CPU_X86_H
#define BN_CPU_X86_H

int bn_x86_has_avx2(void);       /* AVX2, FMA, F16C */
int bn_x86_has_avx512vnni(void); /* the above and AVX-512 F, BW, VL, VNNI */
int bn_x86_has_amx(void);        /* the above and AMX-INT8; the first call asks Linux to let this process use it */

#endif

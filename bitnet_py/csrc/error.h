/* The thread-local reason for the last failure (bn_last_error). */
#ifndef BN_ERROR_H
#define BN_ERROR_H

void bn_set_error(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Sets the reason and returns the status. */
int bn_fail(int status, const char *reason);

#endif

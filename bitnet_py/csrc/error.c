#include "error.h"
#include "bitnet.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char last_error[512];

void bn_set_error(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
}

int bn_fail(int status, const char *reason) {
    bn_set_error("%s", reason);
    return status;
}

const char *bn_last_error(void) { return last_error; }

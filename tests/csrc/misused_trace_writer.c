/* Calls of examples/trace_writer.h in any order (tests/parity/test_your_engine.py): misused_trace_writer DIRECTORY
   CALLS makes one call per letter of CALLS, goes on after an error, and prints it. */
#define _POSIX_C_SOURCE 200112L
#include <unistd.h>
#include "trace_writer.h"

int main(int argc, char **argv) {
    static const float values[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    static const int32_t ids[2] = {3, 4};
    char path[512], long_name[600];
    trace_writer t;
    trace_model model = {"", 1, 1, 1, 4, 4, 4, 9};
    if (argc != 3) return 2;
    memset(model.sha256, 'a', 64);
    memset(long_name, 'n', sizeof long_name - 1);
    long_name[sizeof long_name - 1] = 0;
    for (const char *call = argv[2]; *call; call++) {
        switch (*call) {
        case 'd': /* the model's digest is of a file that is not there */
            trace_sha256_file(argv[1], model.sha256);
            break;
        case 'o':
            trace_open(&t, argv[1], "a \"quoted\" \\ name\n\xc3\xa4", &model, ids, 2);
            trace_state(&t, "flags", "-DX=\"y\"");
            break;
        case 's': /* too late */
            trace_state(&t, "version", "1");
            break;
        case 'b':
            trace_begin_pass(&t, ids, 2);
            break;
        case 'n': /* of no tokens */
            trace_begin_pass(&t, ids, 0);
            break;
        case 't':
            trace_tap(&t, -1, "inp_embd", values, 2, 4, 0);
            break;
        case 'r': /* a row: of the last token */
            trace_tap_from(&t, 1, -1, "result_norm", values, 1, 4, 0);
            break;
        case 'z': /* zero values */
            trace_tap(&t, 0, "q", values, 2, 0, 4);
            break;
        case 'x': /* beyond the pass */
            trace_tap_from(&t, 2, 0, "q", values, 1, 1, 4);
            break;
        case 'l': /* more of the header than it has room for */
            for (int i = 0; i < 40; i++) trace_tap(&t, 0, long_name, values, 2, 1, 4);
            break;
        case 'e':
            trace_end_pass(&t);
            break;
        case 'f': /* the disk is full when the second pass, or trace.json, is written */
            snprintf(path, sizeof path, "%s/pass-0001.safetensors.part", argv[1]);
            if (symlink("/dev/full", path)) return 2;
            break;
        case 'F':
            if (!freopen("/dev/full", "wb", t.json)) return 2;
            break;
        case 'c':
            if (!trace_close(&t) != !t.error) return 2;
            break;
        default:
            return 2;
        }
    }
    puts(t.error ? t.error : "");
    return 0;
}

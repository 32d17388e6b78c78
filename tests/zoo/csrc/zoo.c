#include "zoo.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

zoo_selection zoo_selected = {ZOO_NO_FAULT, {ZOO_ANY, ZOO_ANY, ZOO_ANY}};
_Thread_local zoo_place zoo_at = {ZOO_MODEL_WIDE, -1, ZOO_PREFILL};

static const char *const fault_names[] = {ZOO_FAULT_NAMES};
static const char *const tap_names[] = {ZOO_TAP_NAMES};
static const char *const pass_names[] = {"prefill", "decode"};

static int find(const char *const *names, int n, const char *name, int32_t *out) {
    for (int i = 0; i < n; i++) {
        if (strcmp(names[i], name) == 0) {
            *out = i;
            return 0;
        }
    }
    return 1;
}

#define FIND(names, name, out) find(names, (int)(sizeof names / sizeof *names), name, out)

static int parse(char *text, zoo_selection *out) {
    char *rest = NULL, *part = strtok_r(text, ":", &rest);
    if (!part) return 0;
    if (FIND(fault_names, part, &out->fault)) return 1;
    while ((part = strtok_r(NULL, ":", &rest))) {
        char *value = strchr(part, '=');
        if (!value) return 1;
        *value++ = 0;
        if (strcmp(part, "layer") == 0) {
            char *end;
            out->place.layer = (int32_t)strtol(value, &end, 10);
            if (*end || end == value) return 1;
        } else if (strcmp(part, "op") == 0) {
            if (FIND(tap_names, value, &out->place.op)) return 1;
        } else if (strcmp(part, "pass") == 0) {
            if (FIND(pass_names, value, &out->place.pass)) return 1;
        } else {
            return 1;
        }
    }
    return 0;
}

int bn_zoo_select(const char *text) {
    char copy[256];
    if (strlen(text) >= sizeof copy) return 1;
    strcpy(copy, text);
    zoo_selection selection = {ZOO_NO_FAULT, {ZOO_ANY, ZOO_ANY, ZOO_ANY}};
    if (parse(copy, &selection)) return 1;
    zoo_selected = selection;
    return 0;
}

__attribute__((constructor)) static void select_from_environment(void) {
    const char *text = getenv("BN_FAULT");
    if (!text || !bn_zoo_select(text)) return;
    fprintf(stderr, "BN_FAULT=%s: no such fault or place\n", text);
    abort();
}

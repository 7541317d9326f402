/* Calls an endpoint and prints the response's JSON: fetch ENDPOINT METHOD PATH [BODY].
 * TIMES repeats the call. CAPACITY is the size of the first buffer: too small, the response is asked for again.
 * RAW is sent in place of all that, as it is.
 */
#include <stdio.h>

#include "ifabric.h"

static long number(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}

int main(int argc, char **argv) {
    static char request[65536];
    const char *raw = getenv("RAW");
    int length;
    if (raw != NULL) {
        length = snprintf(request, sizeof request, "%s", raw);
    } else if (argc < 4) {
        return 2;
    } else {
        length = snprintf(request, sizeof request, "{\"endpoint\":\"%s\",\"method\":\"%s\",\"path\":\"%s\"%s%s%s}", argv[1],
                          argv[2], argv[3], argc > 4 ? ",\"body\":\"" : "", argc > 4 ? argv[4] : "", argc > 4 ? "\"" : "");
    }
    if (length < 0 || length >= (int)sizeof request) return 3;
    for (long times = number("TIMES", 1); times > 0; times--) {
        int32_t capacity = (int32_t)number("CAPACITY", 65536);
        char *out = malloc((size_t)capacity + 1);
        int32_t n = ifabric_http(request, length, out, capacity);
        if (n < 0) {
            fprintf(stderr, "needs %d\n", -n);
            capacity = -n;
            out = realloc(out, (size_t)capacity + 1);
            n = ifabric_http(NULL, 0, out, capacity);
        }
        if (n < 0) return 4;
        fwrite(out, 1, (size_t)n, stdout);
        fputc('\n', stdout);
        fflush(stdout);
        free(out);
    }
    return 0;
}

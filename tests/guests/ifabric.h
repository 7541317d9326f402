/* What a guest of InfraFabric may ask of its host beyond WASI preview 1: HTTP to the endpoints that its run was given.
 * Copy this file; nothing else is needed. Memory has to be exported as "memory", which clang and wasi-libc do.
 *
 *     clang --target=wasm32-wasi -O2 -o agent.wasm agent.c
 *
 * A request is JSON in the guest's memory:
 *
 *     {"endpoint": "openai", "method": "POST", "path": "/chat/completions",
 *      "query": {"n": "1"}, "headers": {"Accept": "application/json"}, "body": "text"}
 *
 * `endpoint` is a name from the run's `endpoints`; `path` is below the endpoint's url; `query` and `headers` map text to
 * text, and may be left out, as `body` may. Bytes that are not UTF-8 go as `"body_b64"` instead of `"body"`. The guest
 * names no host and sends no credential: the fabric adds the endpoint's own, and the guest never sees it.
 *
 * A response is JSON too, either of
 *
 *     {"status": 200, "headers": {"content-type": "application/json"}, "body": "text"}      or "body_b64": "..."
 *     {"error": {"code": "timeout", "message": "a sentence"}}                               no response came
 *
 * A request that the endpoint does not allow ends the run (`egress_denied`): nothing was sent.
 */
#ifndef IFABRIC_H
#define IFABRIC_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Sends the request and writes its response to `out`.
 *
 * Returns n >= 0: the response is the first n bytes of `out`.
 *         n <  0: it needs -n bytes, and `out` has fewer. The response is kept: call again with request_len 0 and a
 *                 larger `out` to have it without another request. The next request drops it.
 */
__attribute__((import_module("ifabric"), import_name("http")))
int32_t ifabric_http(const char *request, int32_t request_len, char *out, int32_t out_capacity);

/* The response as a string that the caller frees, or NULL when there is no memory for it. */
static inline char *ifabric_fetch(const char *request) {
    int32_t capacity = 4096;
    char *out = malloc((size_t)capacity);
    if (out == NULL) return NULL;
    int32_t n = ifabric_http(request, (int32_t)strlen(request), out, capacity - 1);
    if (n < 0) {
        free(out);
        capacity = -n + 1;
        out = malloc((size_t)capacity);
        if (out == NULL) return NULL;
        n = ifabric_http(NULL, 0, out, capacity - 1);
        if (n < 0) {
            free(out);
            return NULL;
        }
    }
    out[n] = '\0';
    return out;
}

#endif

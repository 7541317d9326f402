/* Looks for what a former tenant left behind, then leaves as much as it can itself: remember CANARY:name1234.
 *
 * A canary is "CANARY:" and eight characters. It is looked for in all of the memory, in pages that were just grown, and
 * in stdin; what differs from the tenant's own is told as "found WHERE canary", a fresh page that is not zero as "dirty".
 * PAGES says how many pages it grows by; END how it ends: "trap", "loop", or by itself.
 * No copy of the bare word is in the memory, since it is compared letter by letter with its complement.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAGE 65536u
#define CANARY_LENGTH 15u

extern char **environ;
static volatile int runs = 0;
static char kept[4096];
static const uint8_t hidden[7] = {'C' ^ 0xff, 'A' ^ 0xff, 'N' ^ 0xff, 'A' ^ 0xff, 'R' ^ 0xff, 'Y' ^ 0xff, ':' ^ 0xff};

static int at(const volatile uint8_t *from) {
    for (unsigned i = 0; i < sizeof hidden; i++)
        if ((uint8_t)(from[i] ^ 0xff) != hidden[i]) return 0;
    return 1;
}

static int search(const char *where, uintptr_t from, uintptr_t end, const char *own) {
    int found = 0;
    for (uintptr_t here = from; here + CANARY_LENGTH <= end; here++) {
        if (!at((const volatile uint8_t *)here) || memcmp((const char *)here, own, CANARY_LENGTH) == 0) continue;
        if (found++ < 5) printf("found %s %.15s at %lu\n", where, (const char *)here, (unsigned long)here);
    }
    return found;
}

int main(int argc, char **argv) {
    const char *own = argc > 1 ? argv[1] : "";
    static char line[256];
    if (strlen(own) != CANARY_LENGTH) return 2;
    setvbuf(stdout, line, _IOLBF, sizeof line);
    printf("runs %d\n", ++runs);
    printf("args %d\n", argc);
    int variables = 0;
    for (char **entry = environ; entry && *entry; entry++) variables++;
    printf("env %d\n", variables);
    search("memory", 1, (uintptr_t)__builtin_wasm_memory_size(0) * PAGE, own);

    uintptr_t grown = 0;
    const char *pages = getenv("PAGES");
    const size_t more = pages ? (size_t)atol(pages) : 64;
    const size_t before = __builtin_wasm_memory_grow(0, more);
    if (before == SIZE_MAX) return 3;
    for (uintptr_t here = before * PAGE; here < (before + more) * PAGE; here += 4)
        if (*(volatile uint32_t *)here != 0 && grown++ < 5) printf("dirty %lu\n", (unsigned long)here);
    search("grown", before * PAGE, (before + more) * PAGE, own);

    static char input[4096];
    const size_t read = fread(input, 1, sizeof input - 1, stdin);
    printf("stdin %zu\n", read);
    search("stdin", (uintptr_t)input, (uintptr_t)input + read, own);

    for (uintptr_t here = before * PAGE; here + 16 <= (before + more) * PAGE; here += 16) {
        memcpy((void *)here, own, CANARY_LENGTH);
        *(char *)(here + 15) = ' ';
    }
    for (size_t i = 0; i + 16 <= sizeof kept; i += 16) memcpy(kept + i, own, CANARY_LENGTH);
    printf("left %zu\n", more);
    const char *end = getenv("END");
    if (end && strcmp(end, "trap") == 0) __builtin_trap();
    while (end && strcmp(end, "loop") == 0) runs++;
    return 0;
}

/* Takes a megabyte at a time, and writes to all of it, until there is no more: "got N". */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(void) {
    static char line[32];
    void **last = NULL, **one;
    int got = 0;
    setvbuf(stdout, line, _IOLBF, sizeof line); /* at the end there is nothing left to buffer with */
    for (; (one = malloc(1 << 20)) != NULL; last = one, got++) {
        memset(one, 0x5a, 1 << 20);
        *one = last; /* all of them stay in use */
    }
    for (int seen = 0; last != NULL; last = *last)
        if (++seen > got) return 1;
    printf("got %d\n", got);
    return 0;
}

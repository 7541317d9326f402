/* Sleeps as its arguments say, "sleep MS" or "poll MS", and tells how long that took: "slept MS". */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    const long ms = atol(argv[2]);
    struct timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    int failed;
    if (strcmp(argv[1], "poll") == 0) {
        failed = poll(NULL, 0, (int)ms) < 0;
    } else {
        const struct timespec asked = {ms / 1000, ms % 1000 * 1000000};
        failed = nanosleep(&asked, NULL) != 0;
    }
    clock_gettime(CLOCK_MONOTONIC, &to);
    if (failed) return 1;
    printf("slept %lld\n", (to.tv_sec - from.tv_sec) * 1000LL + (to.tv_nsec - from.tv_nsec) / 1000000);
    return 0;
}

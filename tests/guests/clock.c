/* Tells the time, and that its monotonic clock never goes back: "now S", "steps N". */
#include <stdio.h>
#include <time.h>

int main(void) {
    struct timespec now, before, after, resolution;
    if (clock_gettime(CLOCK_REALTIME, &now)) return 1;
    printf("now %lld\n", (long long)now.tv_sec);
    if (clock_gettime(CLOCK_MONOTONIC, &before) || clock_getres(CLOCK_MONOTONIC, &resolution)) return 2;
    int steps = 0;
    for (int i = 0; i < 10000; i++) {
        if (clock_gettime(CLOCK_MONOTONIC, &after)) return 3;
        if (after.tv_sec < before.tv_sec || (after.tv_sec == before.tv_sec && after.tv_nsec < before.tv_nsec)) return 4;
        steps += after.tv_nsec != before.tv_nsec;
        before = after;
    }
    printf("steps %d\n", steps);
    return 0;
}

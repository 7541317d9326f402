/* A small real job: whole numbers from stdin, one a line; their count, sum, median and order to stdout. */
#include <stdio.h>
#include <stdlib.h>

static int compare(const void *a, const void *b) {
    const long long x = *(const long long *)a, y = *(const long long *)b;
    return (x > y) - (x < y);
}

int main(void) {
    size_t count = 0, capacity = 1024;
    long long *numbers = malloc(capacity * sizeof *numbers), sum = 0, one;
    while (scanf("%lld", &one) == 1) {
        if (count == capacity) numbers = realloc(numbers, (capacity *= 2) * sizeof *numbers);
        if (numbers == NULL) return 2;
        numbers[count++] = one;
        sum += one;
    }
    if (count == 0) return 1;
    qsort(numbers, count, sizeof *numbers, compare);
    printf("count %zu\nsum %lld\nmedian %lld\n", count, sum, numbers[count / 2]);
    for (size_t i = 0; i < count; i++) printf("%lld\n", numbers[i]);
    return 0;
}

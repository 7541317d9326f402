/* Says hello to each of its arguments: what a pool must still be able to do after every bomb. */
#include <stdio.h>

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) printf("hello %s\n", argv[i]);
    return 0;
}

/* Abuses file descriptors. Tells each one beyond stdin, stdout and stderr that answered, and how each abuse ended. */
#include <stdio.h>
#include <wasi/api.h>

static uint8_t byte = '!';

static int writes(__wasi_fd_t fd) {
    const __wasi_ciovec_t vector = {&byte, 1};
    __wasi_size_t written = 0;
    return __wasi_fd_write(fd, &vector, 1, &written) == 0;
}

static int reads(__wasi_fd_t fd) {
    uint8_t into[16];
    const __wasi_iovec_t vector = {into, sizeof into};
    __wasi_size_t n = 0;
    return __wasi_fd_read(fd, &vector, 1, &n) == 0;
}

static int answers(__wasi_fd_t fd) {
    __wasi_prestat_t prestat;
    __wasi_fdstat_t stat;
    __wasi_filestat_t file;
    __wasi_filesize_t at;
    return (writes(fd) ? 1 : 0) | (reads(fd) ? 2 : 0) | (__wasi_fd_prestat_get(fd, &prestat) == 0 ? 4 : 0) |
           (__wasi_fd_fdstat_get(fd, &stat) == 0 ? 8 : 0) | (__wasi_fd_filestat_get(fd, &file) == 0 ? 16 : 0) |
           (__wasi_fd_seek(fd, 0, __WASI_WHENCE_CUR, &at) == 0 ? 32 : 0) | (__wasi_fd_sync(fd) == 0 ? 64 : 0) |
           (__wasi_fd_allocate(fd, 0, 1 << 30) == 0 ? 128 : 0) | (__wasi_fd_filestat_set_size(fd, 1 << 30) == 0 ? 256 : 0);
}

int main(void) {
    int answered = 0;
    for (__wasi_fd_t fd = 3; fd < 1000; fd++) answered += answers(fd) != 0;
    const __wasi_fd_t odd[] = {1u << 20, 0x7fffffffu, 0x80000000u, 0xfffffffeu, 0xffffffffu};
    for (unsigned i = 0; i < sizeof odd / sizeof *odd; i++) answered += answers(odd[i]) != 0;
    printf("answered %d\n", answered);
    /* no file grows behind stdout, and nothing is to be had by moving it about */
    printf("stretched %d\n", __wasi_fd_allocate(1, 0, 1 << 30) == 0 || __wasi_fd_filestat_set_size(1, 1 << 30) == 0);
    fflush(stdout);
    for (__wasi_fd_t fd = 3; fd < 64; fd++) {
        (void)!__wasi_fd_renumber(0, fd);
        (void)!__wasi_fd_renumber(fd, 0);
        (void)!__wasi_fd_renumber(2, fd);
        (void)!__wasi_fd_renumber(fd, fd + 1);
    }
    (void)!__wasi_fd_renumber(1, 0xffffffffu);
    (void)!__wasi_fd_close(0);
    (void)!__wasi_fd_close(2);
    (void)!__wasi_fd_close(1);
    for (int times = 0; times < 1000; times++) {
        (void)!__wasi_fd_close(1);
        (void)!reads(0);
    }
    return answered;
}

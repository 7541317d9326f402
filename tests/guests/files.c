/* Tries to reach a file in every way that WASI has, from every descriptor. Tells what it got: "got HOW FD PATH errno". */
#include <stdio.h>
#include <string.h>
#include <wasi/api.h>

static const char *const PATHS[] = {
    ".", "/", "..", "../", "../../../../../../../../etc/passwd", "/etc/passwd", "etc/passwd", "./etc/../../etc/passwd",
    "/proc/self/environ", "proc/self/mem", "/proc/1/root", "/proc/self/fd/0", "/dev/shm", "/dev/null", "/dev/urandom", "/sys",
    "/tmp", "/tmp/escape", "tmp/escape", "/root", "/root/.ssh", "link", "link/../../etc/passwd", "a/b/c/d", "passwd/",
    "//etc//passwd", "/etc/passwd/.", "\\\\?\\C:\\", "C:\\Windows", "", "/var/run/docker.sock", "/run/secrets",
};
enum { PATH_COUNT = sizeof PATHS / sizeof *PATHS };

static int tried, got;

static void outcome(const char *how, __wasi_fd_t fd, const char *path, int errno_) {
    tried++;
    if (errno_ != 0) return;
    got++;
    printf("got %s %u %s\n", how, fd, path);
}

static void on(__wasi_fd_t fd, const char *path) {
    const __wasi_rights_t all = 0x1fffffff, few = __WASI_RIGHTS_FD_READ; /* all that are defined */
    __wasi_fd_t opened;
    __wasi_filestat_t stat;
    uint8_t into[256];
    __wasi_size_t n;
    outcome("open", fd, path, __wasi_path_open(fd, __WASI_LOOKUPFLAGS_SYMLINK_FOLLOW, path, 0, few, few, 0, &opened));
    outcome("list", fd, path, __wasi_path_open(fd, 0, path, __WASI_OFLAGS_DIRECTORY, few, few, 0, &opened));
    outcome("create", fd, path, __wasi_path_open(fd, 0, path, __WASI_OFLAGS_CREAT, all, all, 0, &opened));
    outcome("stat", fd, path, __wasi_path_filestat_get(fd, __WASI_LOOKUPFLAGS_SYMLINK_FOLLOW, path, &stat));
    outcome("touch", fd, path, __wasi_path_filestat_set_times(fd, 0, path, 0, 0, __WASI_FSTFLAGS_MTIM_NOW));
    outcome("readlink", fd, path, __wasi_path_readlink(fd, path, into, sizeof into, &n));
    outcome("mkdir", fd, path, __wasi_path_create_directory(fd, path));
    outcome("symlink", fd, path, __wasi_path_symlink("/etc/passwd", fd, path));
    outcome("link", fd, path, __wasi_path_link(fd, 0, "/etc/passwd", fd, path));
    outcome("rename", fd, path, __wasi_path_rename(fd, path, fd, "elsewhere"));
    outcome("unlink", fd, path, __wasi_path_unlink_file(fd, path));
    outcome("rmdir", fd, path, __wasi_path_remove_directory(fd, path));
}

static void preopened(__wasi_fd_t fd) {
    __wasi_prestat_t prestat;
    uint8_t into[1024];
    __wasi_size_t n;
    outcome("prestat", fd, "", __wasi_fd_prestat_get(fd, &prestat));
    outcome("dirname", fd, "", __wasi_fd_prestat_dir_name(fd, into, sizeof into));
    outcome("readdir", fd, "", __wasi_fd_readdir(fd, into, sizeof into, 0, &n));
}

int main(void) {
    for (__wasi_fd_t fd = 0; fd < 16; fd++) {
        preopened(fd);
        for (int i = 0; i < PATH_COUNT; i++) on(fd, PATHS[i]);
    }
    on(0xffffffffu, "/etc/passwd");
    for (int i = 0; i < PATH_COUNT; i++) { /* as a program would, through the library */
        FILE *file = fopen(PATHS[i], "r");
        outcome("fopen", 0, PATHS[i], file == NULL);
        if (file != NULL) fclose(file);
    }
    printf("tried %d\ngot %d\n", tried, got);
    return got;
}

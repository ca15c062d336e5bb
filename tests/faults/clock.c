/* A wall clock that is shifted by the seconds in a file, for Python's processes; the monotonic clock is the kernel's. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile long long *shift;

__attribute__((constructor)) static void open_shift(void) {
    char name[4096];
    const char *file = getenv("CLOCK_SHIFT_FILE");
    ssize_t length = readlink("/proc/self/exe", name, sizeof name - 1);
    if (!file || length < 0) return;
    name[length] = 0;
    if (!strstr(name, "python")) return;
    int handle = open(file, O_RDONLY | O_CLOEXEC);
    if (handle < 0) return;
    void *at = mmap(NULL, sizeof *shift, PROT_READ, MAP_SHARED, handle, 0);
    if (at != MAP_FAILED) shift = at;
    close(handle);
}

int clock_gettime(clockid_t id, struct timespec *now) {
    int status = syscall(SYS_clock_gettime, id, now);
    if (!status && shift && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += *shift;
    return status;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

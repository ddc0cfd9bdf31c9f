/* The fake driver's state in this process: settings, the files shared with the test, which devices are visible. */
#include "fake.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct control *control;
struct counters *counters;
bool strict;
int device_count, physical[MAX_DEVICES];
int64_t memory_per_device = (int64_t)1 << 30;

static int physical_count = 1, control_fd = -1;
static atomic_bool initialized, forked;
static _Atomic CUresult sticky_code;
static pthread_mutex_t init_lock = PTHREAD_MUTEX_INITIALIZER, allocation_lock = PTHREAD_MUTEX_INITIALIZER;
static char test[48];

/* As the driver: the list ends at its first entry that names no device, or one named before. */
static int visible_ordinal(const char *entry) {
    if (strncmp(entry, "GPU-", 4) == 0) {
        int found = -1;
        for (int ordinal = 0; ordinal < physical_count; ordinal++) {
            char text[48];
            print_uuid(ordinal, text);
            if (strncasecmp(text, entry, strlen(entry)) == 0) {
                if (found >= 0)
                    return -1;
                found = ordinal;
            }
        }
        return found;
    }
    char *end;
    long ordinal = strtol(entry, &end, 10);
    return end == entry || *end || ordinal < 0 || ordinal >= physical_count ? -1 : (int)ordinal;
}

static void find_devices(void) {
    const char *listed = getenv("CUDA_VISIBLE_DEVICES");
    device_count = 0;
    if (!listed) {
        for (; device_count < physical_count; device_count++)
            physical[device_count] = device_count;
    } else {
        char *copy = strdup(listed), *rest = copy, *entry;
        while ((entry = strsep(&rest, ",")) && device_count < MAX_DEVICES) {
            entry += strspn(entry, " ");
            entry[strcspn(entry, " ")] = 0;
            int ordinal = visible_ordinal(entry);
            for (int i = 0; i < device_count; i++)
                if (physical[i] == ordinal)
                    ordinal = -1;
            if (ordinal < 0)
                break;
            physical[device_count++] = ordinal;
        }
        free(copy);
    }
}

static void *share(int fd, size_t size) {
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return at == MAP_FAILED ? NULL : at;
}

static bool open_files(const char *folder) {
    char path[4096];
    struct stat status;
    if (stat(folder, &status) != 0)
        return false;
    snprintf(test, sizeof test, "%lx.%lx", (unsigned long)status.st_dev, (unsigned long)status.st_ino);

    snprintf(path, sizeof path, "%s/control", folder);
    control_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (control_fd < 0 || flock(control_fd, LOCK_EX) != 0)
        return false;
    bool fresh = fstat(control_fd, &status) == 0 && status.st_size < (off_t)sizeof *control;
    if (fresh && ftruncate(control_fd, sizeof *control) != 0)
        return false;
    control = share(control_fd, sizeof *control);
    if (control && fresh) {
        control->delay_us = 2000;
        control->no_fabric = 1;
    }
    flock(control_fd, LOCK_UN);

    snprintf(path, sizeof path, "%s/counters.%d", folder, getpid());
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, sizeof *counters) != 0)
        return false;
    counters = share(fd, sizeof *counters);
    close(fd);
    return control && counters;
}

/* As with the real driver, a forked child cannot use what its parent initialised. */
static void in_forked_child(void) {
    if (initialized)
        forked = true;
}

API cuInit(unsigned flags) {
    if (flags)
        return INVALID_VALUE;
    if (forked)
        return NOT_INITIALIZED;
    pthread_mutex_lock(&init_lock);
    CUresult result = sticky_code;
    if (!initialized) {
        const char *folder = getenv("FAKECUDA_DIR"), *text;
        if ((text = getenv("FAKECUDA_DEVICES")))
            physical_count = atoi(text) < MAX_DEVICES ? atoi(text) : MAX_DEVICES;
        if ((text = getenv("FAKECUDA_MEMORY")))
            memory_per_device = atoll(text);
        strict = (text = getenv("FAKECUDA_STRICT")) && atoi(text);
        find_devices();
        if (!folder || !open_files(folder)) {
            fprintf(stderr, "fake libcuda.so.1: FAKECUDA_DIR must name a writable folder\n");
            result = OPERATING_SYSTEM;
        } else if (device_count == 0) {
            result = NO_DEVICE;
        } else {
            pthread_atfork(NULL, NULL, in_forked_child);
            initialized = true;
        }
    }
    pthread_mutex_unlock(&init_lock);
    return result;
}

CUresult enter(void) {
    return !initialized || forked ? NOT_INITIALIZED : sticky_code;
}

void set_sticky(CUresult code) {
    CUresult none = OK;
    atomic_compare_exchange_strong(&sticky_code, &none, code);
}

CUresult sticky(void) {
    return sticky_code;
}

bool reaches_zero(_Atomic int64_t *countdown) {
    int64_t left = *countdown;
    while (left > 0)
        if (atomic_compare_exchange_weak(countdown, &left, left - 1))
            return left == 1;
    return false;
}

void lock_allocations(void) {
    pthread_mutex_lock(&allocation_lock); /* flock does not keep out threads of one process */
    flock(control_fd, LOCK_EX);
}

void unlock_allocations(void) {
    flock(control_fd, LOCK_UN);
    pthread_mutex_unlock(&allocation_lock);
}

const char *test_name(void) {
    return test;
}

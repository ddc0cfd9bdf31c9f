/* The fake's device memory: each allocation is a memfd, so it lives as long as anything in any process holds it. */
#include "fake.h"

#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct properties {
    int type, handle_types;
    struct location location;
    void *win32;
    struct { unsigned char compression, rdma; unsigned short usage; unsigned char reserved[4]; } flags;
};
enum { PINNED = 1 };

pthread_rwlock_t memory_lock = PTHREAD_RWLOCK_INITIALIZER;
static struct memory *memories;

/* "/memfd:fakecuda:<physical ordinal>:<test> (deleted)": the ordinal, or -1 for any other file. */
static int ordinal_of(const char *link) {
    char name[128], test[64];
    int ordinal;
    ssize_t length = readlink(link, name, sizeof name - 1);
    if (length < 0)
        return -1;
    name[length] = 0;
    if (sscanf(name, "/memfd:fakecuda:%d:%63s", &ordinal, test) != 2 || strcmp(test, test_name()) != 0)
        return -1;
    return ordinal;
}

static int64_t used_by_process(const char *pid, int ordinal, ino_t **seen, size_t *count) {
    char path[320];
    int64_t sum = 0;
    snprintf(path, sizeof path, "/proc/%s/fd", pid);
    DIR *folder = opendir(path);
    if (!folder)
        return 0;
    for (struct dirent *entry; (entry = readdir(folder));) {
        struct stat status;
        snprintf(path, sizeof path, "/proc/%s/fd/%s", pid, entry->d_name);
        if (ordinal_of(path) != ordinal || stat(path, &status) != 0)
            continue;
        size_t i = 0;
        while (i < *count && (*seen)[i] != status.st_ino)
            i++;
        if (i == *count) {
            *seen = realloc(*seen, (*count + 1) * sizeof **seen);
            (*seen)[(*count)++] = status.st_ino;
            sum += status.st_size;
        }
    }
    closedir(folder);
    return sum;
}

/* Asked of the system each time: a process that was killed gives its memory back without a word. */
static int64_t used(int ordinal) {
    int64_t sum = control->others_use[ordinal];
    ino_t *seen = NULL; /* memory held by several processes, or several times, counts once */
    size_t count = 0;
    DIR *folder = opendir("/proc");
    for (struct dirent *entry; folder && (entry = readdir(folder));)
        if (isdigit((unsigned char)*entry->d_name))
            sum += used_by_process(entry->d_name, ordinal, &seen, &count);
    if (folder)
        closedir(folder);
    free(seen);
    return sum;
}

API cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    struct context *current;
    TRY(enter_context(&current));
    if (!free_bytes || !total)
        return INVALID_VALUE;
    int64_t left = memory_per_device - used(physical[current->device]);
    *total = memory_per_device;
    *free_bytes = left > 0 ? left : 0;
    return OK;
}
ALSO(cuMemGetInfo)

CUresult hold(int fd, unsigned types, struct memory **memory) {
    char path[64];
    struct stat status;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int ordinal = ordinal_of(path);
    for (CUdevice device = 0; device < device_count; device++)
        if (ordinal >= 0 && physical[device] == ordinal && fstat(fd, &status) == 0) {
            *memory = calloc(1, sizeof **memory);
            **memory = (struct memory){
                memories, fd, device, status.st_size, status.st_ino, types, false, 0, 0,
            };
            memories = *memory;
            return OK;
        }
    close(fd);
    return INVALID_VALUE;
}

void forget_if_unused(struct memory *memory) {
    if (memory->references || memory->mappings)
        return;
    struct memory **at = &memories;
    while (*at != memory)
        at = &(*at)->next;
    *at = memory->next;
    close(memory->fd);
    free(memory);
}

static CUresult allocate(CUdevice device, size_t size, unsigned types, struct memory **memory) {
    char name[128];
    if (reaches_zero(&control->fail_allocation))
        return OUT_OF_MEMORY;
    snprintf(name, sizeof name, "fakecuda:%d:%s", physical[device], test_name());
    CUresult result = OUT_OF_MEMORY;
    lock_allocations();
    if (used(physical[device]) + (int64_t)size <= memory_per_device) {
        int fd = memfd_create(name, MFD_CLOEXEC);
        if (fd >= 0 && ftruncate(fd, size) == 0)
            result = hold(fd, types, memory);
        else if (fd >= 0)
            close(fd);
    }
    unlock_allocations();
    return result;
}

/* cuMemAlloc */

API cuMemAlloc_v2(CUdeviceptr *address, size_t size) {
    struct context *current;
    struct memory *memory;
    TRY(enter_context(&current));
    if (!address || !size)
        return INVALID_VALUE;
    pthread_rwlock_wrlock(&memory_lock);
    CUresult result = allocate(current->device, whole_granules(size), 0, &memory);
    if (result == OK)
        result = map_legacy(memory, size, ALLOCATED, address);
    pthread_rwlock_unlock(&memory_lock);
    if (result == OK)
        counters->allocations++;
    return result;
}
ALSO(cuMemAlloc)

API cuMemFree_v2(CUdeviceptr address) {
    struct context *current;
    TRY(enter_context(&current));
    if (!address)
        return OK;
    pthread_rwlock_wrlock(&memory_lock);
    struct mapping *mapping = mapping_at(address);
    bool found = mapping && mapping->address == address && mapping->kind == ALLOCATED;
    if (found) {
        unmap(mapping, false);
        counters->allocations--;
    }
    pthread_rwlock_unlock(&memory_lock);
    return found ? OK : INVALID_VALUE;
}
ALSO(cuMemFree)

/* cuMemCreate and its kin */

static CUresult check_properties(const struct properties *wanted) {
    if (control->no_vmm)
        return NOT_SUPPORTED;
    if (!wanted || wanted->type != PINNED || wanted->location.type != ON_DEVICE)
        return INVALID_VALUE;
    if (wanted->location.id < 0 || wanted->location.id >= device_count)
        return INVALID_DEVICE;
    if (wanted->handle_types & ~(POSIX_FD | FABRIC))
        return INVALID_VALUE;
    if ((wanted->handle_types & POSIX_FD && control->no_posix_fd) || (wanted->flags.rdma && control->no_rdma))
        return NOT_SUPPORTED;
    if (wanted->handle_types & FABRIC) /* a device that could still lacks an IMEX channel */
        return control->no_fabric ? NOT_SUPPORTED : NOT_PERMITTED;
    return OK;
}

struct memory *memory_of(CUmemHandle handle) {
    for (struct memory *memory = memories; memory; memory = memory->next)
        if ((CUmemHandle)memory == handle && memory->references > 0)
            return memory;
    return NULL;
}

API cuMemGetAllocationGranularity(size_t *granularity, const struct properties *wanted, int option) {
    TRY(enter());
    TRY(check_properties(wanted));
    return granularity && (option == 0 || option == 1) ? (*granularity = GRANULARITY, OK) : INVALID_VALUE;
}

API cuMemCreate(CUmemHandle *handle, size_t size, const struct properties *wanted, unsigned long long flags) {
    struct context *current;
    struct memory *memory;
    TRY(enter_context(&current));
    TRY(check_properties(wanted));
    if (!handle || flags || !is_granular(size))
        return INVALID_VALUE;
    pthread_rwlock_wrlock(&memory_lock);
    CUresult result = allocate(wanted->location.id, size, wanted->handle_types, &memory);
    if (result == OK) {
        memory->rdma = wanted->flags.rdma;
        memory->references = 1;
        counters->handles++;
        *handle = (CUmemHandle)memory;
    }
    pthread_rwlock_unlock(&memory_lock);
    return result;
}

API cuMemRelease(CUmemHandle handle) {
    TRY(enter());
    pthread_rwlock_wrlock(&memory_lock);
    struct memory *memory = memory_of(handle);
    if (memory) {
        memory->references--;
        counters->handles--;
        forget_if_unused(memory);
    }
    pthread_rwlock_unlock(&memory_lock);
    return memory ? OK : INVALID_VALUE;
}

API cuMemRetainAllocationHandle(CUmemHandle *handle, void *address) {
    TRY(enter());
    pthread_rwlock_wrlock(&memory_lock);
    struct mapping *mapping = mapping_at((CUdeviceptr)address);
    bool found = handle && mapping && mapping->kind == MAPPED;
    if (found) {
        mapping->memory->references++;
        counters->handles++;
        *handle = (CUmemHandle)mapping->memory;
    }
    pthread_rwlock_unlock(&memory_lock);
    return found ? OK : INVALID_VALUE;
}

API cuMemGetAllocationPropertiesFromHandle(struct properties *found, CUmemHandle handle) {
    TRY(enter());
    pthread_rwlock_rdlock(&memory_lock);
    struct memory *memory = memory_of(handle);
    if (found && memory)
        *found = (struct properties){PINNED, memory->types, {ON_DEVICE, memory->device}, NULL, {.rdma = memory->rdma}};
    pthread_rwlock_unlock(&memory_lock);
    return found && memory ? OK : INVALID_VALUE;
}

API cuMemExportToShareableHandle(void *exported, CUmemHandle handle, int type, unsigned long long flags) {
    TRY(enter());
    if (!exported || flags)
        return INVALID_VALUE;
    if (type != POSIX_FD || control->no_posix_fd)
        return NOT_SUPPORTED;
    pthread_rwlock_rdlock(&memory_lock);
    struct memory *memory = memory_of(handle);
    int fd = memory && memory->types & POSIX_FD ? fcntl(memory->fd, F_DUPFD_CLOEXEC, 3) : -1;
    pthread_rwlock_unlock(&memory_lock);
    if (fd < 0)
        return memory && memory->types & POSIX_FD ? OPERATING_SYSTEM : INVALID_VALUE;
    counters->exports++;
    *(int *)exported = fd;
    return OK;
}

API cuMemImportFromShareableHandle(CUmemHandle *handle, void *exported, int type) {
    struct context *current;
    struct memory *memory;
    TRY(enter_context(&current));
    if (!handle)
        return INVALID_VALUE;
    if (type != POSIX_FD || control->no_posix_fd)
        return NOT_SUPPORTED;
    if (control->sticky_import == -1 - physical[current->device])
        abort();
    if (control->sticky_import == 1 + physical[current->device]) {
        set_sticky(ECC_UNCORRECTABLE);
        return sticky();
    }
    int fd = fcntl((int)(intptr_t)exported, F_DUPFD_CLOEXEC, 3); /* the caller keeps its own */
    if (fd < 0)
        return INVALID_VALUE;
    pthread_rwlock_wrlock(&memory_lock);
    CUresult result = hold(fd, POSIX_FD, &memory);
    if (result == OK) {
        memory->references = 1;
        counters->handles++;
        *handle = (CUmemHandle)memory;
    }
    pthread_rwlock_unlock(&memory_lock);
    return result;
}

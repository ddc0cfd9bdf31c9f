/* What the fake knows of an address: pinned host memory, legacy IPC handles, pointer attributes. */
#include "fake.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct pinned { /* under memory_lock */
    struct pinned *next;
    uintptr_t address;
    size_t size;
    bool by_driver; /* cuMemHostAlloc; otherwise cuMemHostRegister */
};
static struct pinned *pinned;

static struct pinned *pinned_at(uintptr_t address) {
    for (struct pinned *at = pinned; at; at = at->next)
        if (address - at->address < at->size)
            return at;
    return NULL;
}

bool is_pinned(uintptr_t address, size_t size, bool *by_driver) {
    struct pinned *at = pinned_at(address);
    if (!at || size > at->address + at->size - address)
        return false;
    *by_driver = at->by_driver;
    return true;
}

static CUresult pin(uintptr_t address, size_t size, bool by_driver) {
    CUresult result = OK;
    pthread_rwlock_wrlock(&memory_lock);
    for (struct pinned *at = pinned; at; at = at->next)
        if (at->address < address + size && address < at->address + at->size)
            result = ALREADY_REGISTERED;
    if (result == OK) {
        struct pinned *fresh = malloc(sizeof *fresh);
        *fresh = (struct pinned){pinned, address, size, by_driver};
        pinned = fresh;
        counters->pinned++;
    }
    pthread_rwlock_unlock(&memory_lock);
    return result;
}

static CUresult unpin(uintptr_t address, bool by_driver, CUresult otherwise) {
    CUresult result = otherwise;
    pthread_rwlock_wrlock(&memory_lock);
    for (struct pinned **at = &pinned; *at; at = &(*at)->next) {
        struct pinned *found = *at;
        if (found->address != address || found->by_driver != by_driver)
            continue;
        *at = found->next;
        if (by_driver)
            munmap((void *)address, found->size);
        free(found);
        counters->pinned--;
        result = OK;
        break;
    }
    pthread_rwlock_unlock(&memory_lock);
    return result;
}

API cuMemHostAlloc(void **address, size_t size, unsigned flags) {
    struct context *current;
    TRY(enter_context(&current));
    if (!address || !size || flags & ~7u)
        return INVALID_VALUE;
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        return OUT_OF_MEMORY;
    *address = at;
    return pin((uintptr_t)at, size, true);
}

API cuMemFreeHost(void *address) {
    struct context *current;
    TRY(enter_context(&current));
    return unpin((uintptr_t)address, true, INVALID_VALUE);
}

API cuMemHostRegister_v2(void *address, size_t size, unsigned flags) {
    struct context *current;
    TRY(enter_context(&current));
    if (!address || !size || flags & ~15u)
        return INVALID_VALUE;
    if (control->fail_register)
        return NOT_PERMITTED;
    uintptr_t page = (uintptr_t)address & ~(uintptr_t)4095;
    if (msync((void *)page, (uintptr_t)address + size - page, MS_ASYNC) != 0) /* nothing is mapped there */
        return INVALID_VALUE;
    return pin((uintptr_t)address, size, false);
}
ALSO(cuMemHostRegister)

API cuMemHostUnregister(void *address) {
    struct context *current;
    TRY(enter_context(&current));
    return unpin((uintptr_t)address, false, NOT_REGISTERED);
}

/* Legacy IPC */

struct ipc_handle { /* 64 bytes, passed by value */
    uint64_t magic, inode, size;
    int32_t pid, fd;
    char unused[32];
};
static const uint64_t MAGIC = 0x61647563656b6166; /* "fakecuda" */

API cuIpcGetMemHandle(struct ipc_handle *handle, CUdeviceptr address) {
    struct context *current;
    TRY(enter_context(&current));
    pthread_rwlock_rdlock(&memory_lock);
    struct mapping *mapping = mapping_at(address);
    bool found = handle && mapping && mapping->kind == ALLOCATED;
    if (found)
        *handle = (struct ipc_handle){
            MAGIC, mapping->memory->inode, mapping->size, getpid(), mapping->memory->fd, {0},
        };
    pthread_rwlock_unlock(&memory_lock);
    return found ? OK : INVALID_VALUE;
}

API cuIpcOpenMemHandle_v2(CUdeviceptr *address, struct ipc_handle handle, unsigned flags) {
    struct context *current;
    struct stat status;
    struct memory *memory;
    char path[64];
    TRY(enter_context(&current));
    if (!address || flags != 1 || handle.magic != MAGIC)
        return INVALID_VALUE;
    if (handle.pid == getpid())
        return INVALID_CONTEXT;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", handle.pid, handle.fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return INVALID_VALUE; /* the exporter is dead, or has freed it */
    if (fstat(fd, &status) != 0 || status.st_ino != handle.inode || (size_t)status.st_size < handle.size) {
        close(fd);
        return INVALID_VALUE;
    }
    CUresult result = OK;
    pthread_rwlock_wrlock(&memory_lock);
    struct mapping *mapping = mappings;
    while (mapping && !(mapping->kind == IPC && mapping->memory->inode == handle.inode))
        mapping = mapping->next;
    if (mapping) { /* opened before: the same address again, counted */
        close(fd);
        mapping->opens++;
        *address = mapping->address;
    } else {
        result = hold(fd, 0, &memory);
        if (result == OK)
            result = map_legacy(memory, handle.size, IPC, address);
    }
    if (result == OK)
        counters->ipc_opened++;
    pthread_rwlock_unlock(&memory_lock);
    return result;
}
ALSO(cuIpcOpenMemHandle)

API cuIpcCloseMemHandle(CUdeviceptr address) {
    struct context *current;
    TRY(enter_context(&current));
    pthread_rwlock_wrlock(&memory_lock);
    struct mapping *mapping = mapping_at(address);
    bool found = mapping && mapping->address == address && mapping->kind == IPC;
    if (found) {
        counters->ipc_opened--;
        if (--mapping->opens == 0)
            unmap(mapping, false);
    }
    pthread_rwlock_unlock(&memory_lock);
    return found ? OK : INVALID_VALUE;
}

/* Attributes */

API cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr address) {
    struct context *current;
    TRY(enter_context(&current));
    pthread_rwlock_rdlock(&memory_lock);
    struct mapping *mapping = mapping_at(address);
    if (mapping && base)
        *base = mapping->address;
    if (mapping && size)
        *size = mapping->size;
    pthread_rwlock_unlock(&memory_lock);
    return mapping ? OK : NOT_FOUND;
}
ALSO(cuMemGetAddressRange)

/* Of plain host memory nothing is known: `unknown` is the answer then. */
static CUresult attribute_of(void *data, int attribute, CUdeviceptr address, CUresult unknown) {
    struct mapping *mapping = mapping_at(address);
    struct pinned *host = mapping ? NULL : pinned_at(address);
    bool known = mapping || host;
    switch (attribute) {
    case 1: /* context; what cuMemMap maps belongs to none */
        *(CUcontext *)data = mapping && mapping->kind != MAPPED ? context_of(mapping->memory->device) : NULL;
        break;
    case 2: *(int *)data = mapping ? 2 : host ? 1 : 0; break; /* memory type */
    case 3: *(CUdeviceptr *)data = known ? address : 0; break;
    case 4: *(void **)data = host ? (void *)address : NULL; break;
    case 8: *(bool *)data = false; break;                     /* managed */
    case 9: *(int *)data = mapping ? mapping->memory->device : host ? 0 : -2; break;
    case 10: *(bool *)data = mapping && mapping->kind == ALLOCATED; break; /* fit for legacy IPC */
    case 11: *(CUdeviceptr *)data = mapping ? mapping->address : host ? host->address : 0; break;
    case 12: *(size_t *)data = mapping ? mapping->size : host ? host->size : 0; break;
    case 13: *(bool *)data = known; break;                    /* mapped */
    case 14: *(uint64_t *)data = mapping ? mapping->memory->types : 0; break;
    case 15: *(bool *)data = mapping && mapping->memory->rdma; break;
    case 16: *(int *)data = mapping ? (int)mapping->access[mapping->memory->device] : host ? READ_WRITE : 0; break;
    default: return INVALID_VALUE;
    }
    return known ? OK : unknown;
}

API cuPointerGetAttribute(void *data, int attribute, CUdeviceptr address) {
    TRY(enter());
    if (!data)
        return INVALID_VALUE;
    pthread_rwlock_rdlock(&memory_lock);
    CUresult result = attribute_of(data, attribute, address, INVALID_VALUE);
    pthread_rwlock_unlock(&memory_lock);
    return result;
}

API cuPointerGetAttributes(unsigned count, int *attributes, void **data, CUdeviceptr address) {
    TRY(enter());
    if (!attributes || !data)
        return INVALID_VALUE;
    CUresult result = OK;
    pthread_rwlock_rdlock(&memory_lock);
    for (unsigned i = 0; i < count && result == OK; i++)
        result = attribute_of(data[i], attributes[i], address, OK);
    pthread_rwlock_unlock(&memory_lock);
    return result;
}

/* The fake's device addresses: ranges that are reserved, what is mapped there, and who may touch it. */
#include "fake.h"

#include <stdlib.h>
#include <sys/mman.h>

struct access { struct location location; int flags; };
struct reservation {
    struct reservation *next;
    CUdeviceptr address;
    size_t size;
};

struct mapping *mappings;
static struct reservation *reservations;

bool is_granular(size_t size) {
    return size && size % GRANULARITY == 0;
}

/* Address space that nothing else can take */
static CUdeviceptr reserve(CUdeviceptr hint, size_t size, size_t alignment) {
    char *at = mmap((void *)hint, size + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED)
        return 0;
    char *aligned = (char *)(((uintptr_t)at + alignment - 1) / alignment * alignment);
    if (aligned > at)
        munmap(at, aligned - at);
    munmap(aligned + size, at + alignment - aligned);
    return (CUdeviceptr)aligned;
}

size_t whole_granules(size_t size) {
    return (size + GRANULARITY - 1) / GRANULARITY * GRANULARITY;
}

static int host_protection(const struct mapping *mapping) {
    unsigned right = 0;
    for (CUdevice device = 0; device < device_count; device++)
        right |= mapping->access[device];
    if (strict || !right)
        return PROT_NONE;
    return right == READ ? PROT_READ : PROT_READ | PROT_WRITE;
}

static CUresult map(struct mapping wanted) {
    struct memory *memory = wanted.memory;
    size_t size = whole_granules(wanted.size);
    wanted.alias = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, memory->fd, 0);
    if (wanted.alias == MAP_FAILED)
        return OUT_OF_MEMORY;
    madvise(wanted.alias, size, MADV_DONTFORK); /* a forked child has no device memory */
    void *at = (void *)wanted.address;
    if (mmap(at, size, host_protection(&wanted), MAP_SHARED | MAP_FIXED, memory->fd, 0) == MAP_FAILED) {
        munmap(wanted.alias, size);
        return OUT_OF_MEMORY;
    }
    struct mapping *mapping = malloc(sizeof *mapping);
    *mapping = wanted;
    mapping->next = mappings;
    mappings = mapping;
    memory->mappings++;
    return OK;
}

void unmap(struct mapping *mapping, bool keep_reserved) {
    struct mapping **at = &mappings;
    while (*at != mapping)
        at = &(*at)->next;
    *at = mapping->next;
    size_t size = whole_granules(mapping->size);
    munmap(mapping->alias, size);
    if (keep_reserved)
        mmap((void *)mapping->address, size, PROT_NONE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    else
        munmap((void *)mapping->address, size);
    mapping->memory->mappings--;
    forget_if_unused(mapping->memory);
    free(mapping);
}

/* Memory that comes with its addresses, accessible to every device: cuMemAlloc, and the same opened elsewhere */
CUresult map_legacy(struct memory *memory, size_t size, enum kind kind, CUdeviceptr *address) {
    struct mapping wanted = {.size = size, .memory = memory, .kind = kind, .opens = 1};
    for (CUdevice device = 0; device < device_count; device++)
        wanted.access[device] = READ_WRITE;
    wanted.address = reserve(0, whole_granules(size), GRANULARITY);
    CUresult result = wanted.address ? map(wanted) : OUT_OF_MEMORY;
    if (result == OK)
        *address = wanted.address;
    else
        forget_if_unused(memory);
    return result;
}

struct mapping *mapping_at(CUdeviceptr address) {
    for (struct mapping *mapping = mappings; mapping; mapping = mapping->next)
        if (address - mapping->address < mapping->size)
            return mapping;
    return NULL;
}

static struct reservation *reservation_of(CUdeviceptr address, size_t size) {
    for (struct reservation *at = reservations; at; at = at->next)
        if (address >= at->address && address - at->address < at->size && size <= at->address + at->size - address)
            return at;
    return NULL;
}

bool is_device_address(CUdeviceptr address) {
    return mapping_at(address) || reservation_of(address, 1);
}

char *device_bytes(CUdeviceptr address, CUdevice device, unsigned right, size_t *available) {
    struct mapping *mapping = mapping_at(address);
    if (!mapping || (mapping->access[device] & right) != right)
        return NULL;
    *available = mapping->address + mapping->size - address;
    return mapping->alias + (address - mapping->address);
}

/* cuMemMap and its kin */

API cuMemAddressReserve(CUdeviceptr *address, size_t size, size_t alignment, CUdeviceptr hint,
                        unsigned long long flags) {
    TRY(enter());
    if (!address || flags || !is_granular(size) || alignment & (alignment - 1))
        return INVALID_VALUE;
    CUdeviceptr at = reserve(hint, size, alignment > GRANULARITY ? alignment : GRANULARITY);
    if (!at)
        return OUT_OF_MEMORY;
    struct reservation *reservation = malloc(sizeof *reservation);
    pthread_rwlock_wrlock(&memory_lock);
    *reservation = (struct reservation){reservations, at, size};
    reservations = reservation;
    pthread_rwlock_unlock(&memory_lock);
    counters->reservations++;
    *address = at;
    return OK;
}

static bool overlaps_mapping(CUdeviceptr address, size_t size) {
    for (struct mapping *mapping = mappings; mapping; mapping = mapping->next)
        if (mapping->address < address + size && address < mapping->address + mapping->size)
            return true;
    return false;
}

API cuMemAddressFree(CUdeviceptr address, size_t size) {
    TRY(enter());
    CUresult result = INVALID_VALUE;
    pthread_rwlock_wrlock(&memory_lock);
    for (struct reservation **at = &reservations; *at; at = &(*at)->next) {
        struct reservation *reservation = *at;
        if (reservation->address != address || reservation->size != size || overlaps_mapping(address, size))
            continue;
        *at = reservation->next;
        munmap((void *)address, size);
        free(reservation);
        counters->reservations--;
        result = OK;
        break;
    }
    pthread_rwlock_unlock(&memory_lock);
    return result;
}

API cuMemMap(CUdeviceptr address, size_t size, size_t offset, CUmemHandle handle, unsigned long long flags) {
    TRY(enter());
    if (flags || offset || !is_granular(size) || address % GRANULARITY) /* the real driver takes no offset either */
        return INVALID_VALUE;
    CUresult result = INVALID_VALUE;
    pthread_rwlock_wrlock(&memory_lock);
    struct memory *memory = memory_of(handle);
    if (memory && size <= memory->size && reservation_of(address, size) && !overlaps_mapping(address, size))
        result = map((struct mapping){.address = address, .size = size, .memory = memory, .kind = MAPPED});
    if (result == OK)
        counters->mappings++;
    pthread_rwlock_unlock(&memory_lock);
    return result;
}

/* Whether the range is whole mappings from end to end: the driver takes neither a part of one nor a gap. */
static bool covers_mappings(CUdeviceptr address, size_t size) {
    CUdeviceptr end = address + size;
    while (address < end) {
        struct mapping *mapping = mapping_at(address);
        if (!mapping || mapping->kind != MAPPED || mapping->address != address || mapping->size > end - address)
            return false;
        address += mapping->size;
    }
    return size > 0;
}

API cuMemUnmap(CUdeviceptr address, size_t size) {
    TRY(enter());
    pthread_rwlock_wrlock(&memory_lock);
    bool covered = covers_mappings(address, size);
    for (CUdeviceptr at = address; covered && at < address + size;) {
        struct mapping *mapping = mapping_at(at);
        at += mapping->size;
        unmap(mapping, true);
        counters->mappings--;
    }
    pthread_rwlock_unlock(&memory_lock);
    return covered ? OK : INVALID_VALUE;
}

static CUresult check_location(const struct location *location) {
    if (!location || location->type != ON_DEVICE)
        return INVALID_VALUE;
    return location->id >= 0 && location->id < device_count ? OK : INVALID_DEVICE;
}

API cuMemSetAccess(CUdeviceptr address, size_t size, const struct access *wanted, size_t count) {
    TRY(enter());
    for (size_t i = 0; i < count; i++) {
        TRY(check_location(&wanted[i].location));
        if (wanted[i].flags != 0 && wanted[i].flags != READ && wanted[i].flags != READ_WRITE)
            return INVALID_VALUE;
    }
    pthread_rwlock_wrlock(&memory_lock);
    bool covered = wanted && count && covers_mappings(address, size);
    for (CUdeviceptr at = address; covered && at < address + size;) {
        struct mapping *mapping = mapping_at(at);
        for (size_t i = 0; i < count; i++)
            mapping->access[wanted[i].location.id] = wanted[i].flags;
        mprotect((void *)mapping->address, mapping->size, host_protection(mapping));
        at += mapping->size;
    }
    pthread_rwlock_unlock(&memory_lock);
    return covered ? OK : INVALID_VALUE;
}

API cuMemGetAccess(unsigned long long *flags, const struct location *location, CUdeviceptr address) {
    TRY(enter());
    TRY(check_location(location));
    pthread_rwlock_rdlock(&memory_lock);
    struct mapping *mapping = mapping_at(address);
    if (flags && mapping)
        *flags = mapping->access[location->id];
    pthread_rwlock_unlock(&memory_lock);
    return flags && mapping ? OK : INVALID_VALUE;
}

/* The fake's copies and fills. They read their source when they execute, never when they are asked for. */
#include "fake.h"

#include <stdlib.h>
#include <string.h>

enum { HOST = 1, DEVICE = 2, ARRAY = 3, UNIFIED = 4 };

struct side {
    CUdeviceptr address;
    size_t pitch, slice; /* bytes from one row, one plane to the next */
    bool device;
    CUdevice ordinal; /* the device whose rights count */
    bool pinned;
};
struct copy {
    struct side to, from;
    size_t width, height, depth;
    bool is_fill, asynchronous, flips, fails;
    unsigned char fill;
};

static size_t extent(const struct copy *copy, const struct side *side) {
    return (copy->depth - 1) * side->slice + (copy->height - 1) * side->pitch + copy->width;
}

static char *bytes_at(const struct side *side, size_t offset, unsigned right, size_t *available) {
    if (side->device)
        return device_bytes(side->address + offset, side->ordinal, right, available);
    *available = SIZE_MAX;
    return (char *)side->address + offset;
}

/* One row, piece by piece: neighbouring mappings are neighbours only at the program's addresses. */
static bool run_row(const struct copy *copy, size_t to, size_t from, bool only_check) {
    for (size_t done = 0; done < copy->width;) {
        size_t piece = copy->width - done, available;
        char *target = bytes_at(&copy->to, to + done, READ_WRITE, &available), *source = NULL;
        if (!target)
            return false;
        piece = piece < available ? piece : available;
        if (!copy->is_fill) {
            source = bytes_at(&copy->from, from + done, READ, &available);
            if (!source)
                return false;
            piece = piece < available ? piece : available;
        }
        if (!only_check && source)
            memmove(target, source, piece);
        else if (!only_check)
            memset(target, copy->fill, piece);
        done += piece;
    }
    return true;
}

static bool run(const struct copy *copy, bool only_check) {
    for (size_t z = 0; z < copy->depth; z++)
        for (size_t y = 0; y < copy->height; y++)
            if (!run_row(copy, z * copy->to.slice + y * copy->to.pitch, z * copy->from.slice + y * copy->from.pitch,
                         only_check))
                return false;
    return true;
}

/* What tests ask to be wrong in what landed; the program's own source stays right. */
static void damage(const struct copy *copy) {
    size_t available;
    bool by_driver = false;
    if (copy->is_fill || copy->from.device || !copy->to.device)
        return;
    if (copy->flips)
        *bytes_at(&copy->to, copy->width / 2, READ_WRITE, &available) ^= 1;
    if (control->corrupt_streamer && is_pinned(copy->from.address, 1, &by_driver) && by_driver)
        *bytes_at(&copy->to, 0, READ_WRITE, &available) ^= 0xff;
}

static bool still_pinned(const struct copy *copy, const struct side *side) {
    bool by_driver;
    return !side->pinned || is_pinned(side->address, extent(copy, side), &by_driver);
}

static CUresult execute(const struct copy *copy) {
    if (copy->fails)
        set_sticky(LAUNCH_FAILED);
    if (sticky())
        return sticky();
    pthread_rwlock_rdlock(&memory_lock);
    bool legal = still_pinned(copy, &copy->to) && still_pinned(copy, &copy->from) && run(copy, false);
    if (legal)
        damage(copy);
    pthread_rwlock_unlock(&memory_lock);
    if (!legal)
        set_sticky(ILLEGAL_ADDRESS);
    return sticky();
}

static void perform(struct operation *operation) {
    execute(operation->subject);
    free(operation->subject);
}

static CUresult begin(struct copy copy, CUstream handle, struct context *current) {
    struct stream *stream = NULL;
    bool by_driver;
    if (copy.asynchronous)
        TRY(stream_of(handle, current, &stream));
    if (!copy.width || !copy.height || !copy.depth)
        return OK;
    pthread_rwlock_rdlock(&memory_lock);
    bool legal = run(&copy, true);
    copy.to.pinned = !copy.to.device && is_pinned(copy.to.address, extent(&copy, &copy.to), &by_driver);
    copy.from.pinned = !copy.is_fill && !copy.from.device
        && is_pinned(copy.from.address, extent(&copy, &copy.from), &by_driver);
    pthread_rwlock_unlock(&memory_lock);
    if (!legal) {
        set_sticky(ILLEGAL_ADDRESS);
        return sticky();
    }
    copy.fails = !copy.is_fill && reaches_zero(&control->sticky_at);
    bool to_device = !copy.is_fill && !copy.from.device && copy.to.device;
    copy.flips = copy.asynchronous && to_device && reaches_zero(&control->flip_at);
    if (!copy.asynchronous)
        return execute(&copy);
    struct copy *kept = malloc(sizeof *kept);
    *kept = copy;
    bool pageable = (!copy.to.device && !copy.to.pinned)
        || (!copy.is_fill && !copy.from.device && !copy.from.pinned);
    return submit(stream, (struct operation){.perform = perform, .subject = kept}, pageable);
}

static struct side side_of(CUdeviceptr address, int type, struct context *context) {
    pthread_rwlock_rdlock(&memory_lock);
    bool device = type == DEVICE || (type == UNIFIED && is_device_address(address));
    pthread_rwlock_unlock(&memory_lock);
    return (struct side){.address = address, .device = device, .ordinal = context->device};
}

static CUresult flat(CUdeviceptr to, int to_type, CUdeviceptr from, int from_type, size_t size, bool asynchronous,
                     CUstream stream) {
    struct context *current;
    TRY(enter_context(&current));
    struct copy copy = {side_of(to, to_type, current), side_of(from, from_type, current), size, 1, 1,
                        .asynchronous = asynchronous};
    return begin(copy, stream, current);
}

API cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t size) {
    return flat(to, DEVICE, (CUdeviceptr)from, HOST, size, false, NULL);
}
ALSO(cuMemcpyHtoD)

API cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t size) {
    return flat((CUdeviceptr)to, HOST, from, DEVICE, size, false, NULL);
}
ALSO(cuMemcpyDtoH)

API cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t size) {
    return flat(to, DEVICE, from, DEVICE, size, false, NULL);
}
ALSO(cuMemcpyDtoD)

API cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t size) {
    return flat(to, UNIFIED, from, UNIFIED, size, false, NULL);
}

API cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, CUstream stream) {
    return flat(to, DEVICE, (CUdeviceptr)from, HOST, size, true, stream);
}
ALSO(cuMemcpyHtoDAsync)

API cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, CUstream stream) {
    return flat((CUdeviceptr)to, HOST, from, DEVICE, size, true, stream);
}
ALSO(cuMemcpyDtoHAsync)

API cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
    return flat(to, DEVICE, from, DEVICE, size, true, stream);
}
ALSO(cuMemcpyDtoDAsync)

API cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
    return flat(to, UNIFIED, from, UNIFIED, size, true, stream);
}

static CUresult peer(CUdeviceptr to, CUcontext to_context, CUdeviceptr from, CUcontext from_context, size_t size,
                     bool asynchronous, CUstream stream) {
    struct context *current;
    TRY(enter_context(&current));
    if (!known_context(to_context) || !known_context(from_context))
        return INVALID_CONTEXT;
    struct copy copy = {side_of(to, DEVICE, to_context), side_of(from, DEVICE, from_context), size, 1, 1,
                        .asynchronous = asynchronous};
    return begin(copy, stream, current);
}

API cuMemcpyPeer(CUdeviceptr to, CUcontext to_context, CUdeviceptr from, CUcontext from_context, size_t size) {
    return peer(to, to_context, from, from_context, size, false, NULL);
}

API cuMemcpyPeerAsync(CUdeviceptr to, CUcontext to_context, CUdeviceptr from, CUcontext from_context, size_t size,
                      CUstream stream) {
    return peer(to, to_context, from, from_context, size, true, stream);
}

/* Pitched copies; the layouts are the driver's CUDA_MEMCPY2D and CUDA_MEMCPY3D, version 2 */

struct end2d { size_t x, y; int type; const void *host; CUdeviceptr device; void *array; size_t pitch; };
struct copy2d { struct end2d from, to; size_t width, height; };
struct end3d {
    size_t x, y, z, level;
    int type;
    const void *host;
    CUdeviceptr device;
    void *array, *reserved;
    size_t pitch, height;
};
struct copy3d { struct end3d from, to; size_t width, height, depth; };

static CUresult end_of(const struct end3d *end, struct context *current, struct side *side) {
    if (end->type == ARRAY)
        return NOT_SUPPORTED;
    if (end->type != HOST && end->type != DEVICE && end->type != UNIFIED)
        return INVALID_VALUE;
    *side = side_of(end->type == HOST ? (CUdeviceptr)end->host : end->device, end->type, current);
    side->pitch = end->pitch;
    side->slice = end->pitch * end->height;
    side->address += end->z * side->slice + end->y * side->pitch + end->x;
    return OK;
}

static CUresult pitched(const struct copy3d *wanted, bool asynchronous, CUstream stream) {
    struct context *current;
    TRY(enter_context(&current));
    struct copy copy = {.width = wanted->width, .height = wanted->height, .depth = wanted->depth,
                        .asynchronous = asynchronous};
    TRY(end_of(&wanted->to, current, &copy.to));
    TRY(end_of(&wanted->from, current, &copy.from));
    if (copy.height > 1 && (copy.to.pitch < copy.width || copy.from.pitch < copy.width))
        return INVALID_VALUE;
    return begin(copy, stream, current);
}

static struct end3d deepen(struct end2d end) {
    return (struct end3d){end.x, end.y, 0, 0, end.type, end.host, end.device, end.array, NULL, end.pitch, 0};
}

static CUresult pitched2d(const struct copy2d *wanted, bool asynchronous, CUstream stream) {
    if (!wanted)
        return INVALID_VALUE;
    struct copy3d copy = {deepen(wanted->from), deepen(wanted->to), wanted->width, wanted->height, 1};
    return pitched(&copy, asynchronous, stream);
}

API cuMemcpy2D_v2(const struct copy2d *wanted) {
    return pitched2d(wanted, false, NULL);
}
ALSO(cuMemcpy2D)

API cuMemcpy2DAsync_v2(const struct copy2d *wanted, CUstream stream) {
    return pitched2d(wanted, true, stream);
}
ALSO(cuMemcpy2DAsync)

API cuMemcpy3DAsync_v2(const struct copy3d *wanted, CUstream stream) {
    return wanted ? pitched(wanted, true, stream) : INVALID_VALUE;
}
ALSO(cuMemcpy3DAsync)

/* Fills */

static CUresult fill(CUdeviceptr to, unsigned char value, size_t size, bool asynchronous, CUstream stream) {
    struct context *current;
    TRY(enter_context(&current));
    struct copy copy = {.to = side_of(to, DEVICE, current), .width = size, .height = 1, .depth = 1, .is_fill = true,
                        .fill = value, .asynchronous = asynchronous};
    return begin(copy, stream, current);
}

API cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t size) {
    return fill(to, value, size, false, NULL);
}
ALSO(cuMemsetD8)

API cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t size, CUstream stream) {
    return fill(to, value, size, true, stream);
}

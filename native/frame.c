/* frame.c: the one place that turns untrusted bytes into a header. */

#include <stdio.h>
#include <string.h>

#include "connection.h"

_Static_assert(sizeof(xd_header) == XD_HEADER_BYTES, "the header crosses as it lies in memory");
_Static_assert(offsetof(xd_header, sequence) == 16 && offsetof(xd_header, header_crc) == 60, "no padding");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the wire is little-endian, and nothing here swaps bytes");

static uint32_t header_crc(const xd_header *header) {
    return xd_crc32c(0, header, offsetof(xd_header, header_crc));
}

void xd_frame_seal(xd_header *header, uint32_t epoch, const void *payload) {
    header->magic = XD_MAGIC;
    header->version = XD_VERSION;
    header->epoch = epoch;
    header->payload_crc = xd_crc32c(0, payload, header->length);
    header->header_crc = header_crc(header);
}

static int corrupt(char *err, size_t errlen, const char *what, unsigned long found, unsigned long wanted) {
    snprintf(err, errlen, "not a frame of this connection: %s %lu, wanted %lu", what, found, wanted);
    return XD_CORRUPT;
}

/* The magic first, so that a stranger's bytes are told from damage; then the checksum, so that nothing else is believed
 * before it is known to be what was sent. */
int xd_header_read(const void *bytes, size_t n, uint32_t epoch, size_t max_payload, xd_header *header, char *err,
                   size_t errlen) {
    if (n >= sizeof header->magic) {
        memcpy(&header->magic, bytes, sizeof header->magic);
        if (header->magic != XD_MAGIC) return corrupt(err, errlen, "magic", header->magic, XD_MAGIC);
    }
    if (n < XD_HEADER_BYTES) return XD_AGAIN;
    memcpy(header, bytes, XD_HEADER_BYTES);
    uint32_t crc = header_crc(header);
    if (header->header_crc != crc) return corrupt(err, errlen, "header checksum", header->header_crc, crc);
    if (header->version != XD_VERSION) return corrupt(err, errlen, "version", header->version, XD_VERSION);
    if (header->epoch != epoch) return corrupt(err, errlen, "epoch", header->epoch, epoch);
    if (header->kind < XD_ROUND || header->kind > XD_TEST)
        return corrupt(err, errlen, "kind", header->kind, XD_ROUND);
    if (header->queue >= XD_NUM_QUEUES) return corrupt(err, errlen, "queue", header->queue, XD_LATENCY);
    if (header->length > max_payload || (header->kind == XD_CREDIT && header->length))
        return corrupt(err, errlen, "payload bytes", header->length, header->kind == XD_CREDIT ? 0 : max_payload);
    if (header->kind == XD_ROUND && (uint64_t)header->offset + header->length > header->total)
        return corrupt(err, errlen, "end of a piece", header->offset + (unsigned long)header->length, header->total);
    return XD_OK;
}

int xd_frame_read(const void *bytes, size_t n, uint32_t epoch, size_t max_payload, xd_header *header, char *err,
                  size_t errlen) {
    int code = xd_header_read(bytes, n, epoch, max_payload, header, err, errlen);
    if (code) return code;
    if (n - XD_HEADER_BYTES < header->length) return XD_AGAIN;
    uint32_t crc = xd_crc32c(0, (const char *)bytes + XD_HEADER_BYTES, header->length);
    if (header->payload_crc != crc) return corrupt(err, errlen, "payload checksum", header->payload_crc, crc);
    return XD_OK;
}

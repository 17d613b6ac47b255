// Package blob keeps bytes under their SHA-256: models, checkpoints, job artifacts, snapshots.
//
// A Store is the durable side, on a server: any bucket that gocloud.dev/blob can open by URL. What Put has
// acknowledged is complete, visible and on stable storage; before that nothing is visible.
//
// A Cache is the other side, on a node: a folder of bounded size with the artifacts that tasks there read. It resumes
// what was interrupted, hands out only files whose digest it has computed itself, and never evicts one in use.
//
// Both are safe for concurrent use. Neither starts goroutines of its own, and neither retries: the caller knows whether
// to ask the same source again or another.
package blob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"syscall"
)

// Errors that callers tell apart with errors.Is; the text around them says which blob and what to do.
var (
	// ErrNotFound: there is no blob with this digest in the store.
	ErrNotFound = errors.New("blob not found")
	// ErrTooLarge: the bytes exceed the limit that was given, or could never fit in the cache.
	ErrTooLarge = errors.New("blob too large")
	// ErrRange: the offset is negative or past the end of the blob.
	ErrRange = errors.New("offset outside the blob")
	// ErrDigest: the bytes received are not those that the digest names. They have been deleted.
	ErrDigest = errors.New("digest mismatch")
	// ErrNoSpace: the disk, or the quota on it, is full.
	ErrNoSpace = errors.New("no space left on the disk")
	// ErrCacheFull: everything in the cache is in use, so that nothing can be evicted.
	ErrCacheFull = errors.New("cache full")
	// ErrLocked: another process has this cache folder open.
	ErrLocked = errors.New("cache folder in use")
)

// copyBuffer is how many bytes one step of a copy moves.
const copyBuffer = 256 << 10

// errExcess: a reader held more bytes than copyBytes was to copy.
var errExcess = errors.New("more bytes than expected")

// copyBytes copies at most limit bytes from r to w, until ctx ends. It reads one byte more than limit, if there is one, to
// return errExcess rather than a silent cut; w never sees that byte. A read that blocks is r's to interrupt.
func copyBytes(ctx context.Context, w io.Writer, r io.Reader, limit int64) (int64, error) {
	in := contextReader{ctx, r}
	n, err := io.CopyBuffer(w, io.LimitReader(in, limit), make([]byte, copyBuffer))
	if err != nil || n < limit || limit == math.MaxInt64 {
		return n, err
	}
	_, err = io.ReadFull(in, make([]byte, 1))
	switch {
	case errors.Is(err, io.EOF):
		return n, nil
	case err == nil:
		return n, errExcess
	default:
		return n, err
	}
}

// contextReader ends a copy between two reads when its context is done.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if err := context.Cause(c.ctx); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// explain turns the system's words for a full disk into ErrNoSpace.
func explain(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	return err
}

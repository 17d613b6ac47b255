package blob

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"gocloud.dev/blob"
	"gocloud.dev/blob/fileblob"
	_ "gocloud.dev/blob/memblob" // mem://, for tests and trials
	"gocloud.dev/gcerrors"
)

// Store is a bucket of blobs under their digests. A blob lies at "sha256/ab/abcd…", its first two digits spreading
// the folders, so that other tools can find and check it (`sha256sum` of the file gives the file's name).
//
// A file store is written and listed by this package and only read through gocloud: its driver gives a file its name
// without fsync, skips folders that it cannot list, fails to list when a file vanishes, and starts over for each page.
type Store struct {
	bucket *blob.Bucket
	folder *folder // how a file store writes; nil for every other scheme
	shared bool
}

// Info is what a store knows of a blob without reading it.
type Info struct {
	Digest  Digest
	Size    int64     // bytes
	ModTime time.Time // when its bytes were last put
}

// OpenStore opens the bucket that rawURL names. "file:///path" is a folder, created if missing; with "?shared=true" the
// operator says that every server sees the same one (NFS, CephFS…). "mem://" forgets everything at the end, and each
// call gives a new one. Other schemes work once the binary imports their gocloud.dev/blob driver.
//
// Of a file store it removes what writers that died have left unfinished, and spares those still at work.
func OpenStore(ctx context.Context, rawURL string) (*Store, error) {
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, fmt.Errorf("blob store: %w", err)
	}
	if u.Scheme == fileblob.Scheme {
		return openFolderStore(u)
	}
	bucket, err := blob.OpenBucket(ctx, rawURL)
	if err != nil {
		return nil, fmt.Errorf("blob store %s: %w", u.Redacted(), err)
	}
	return &Store{bucket: bucket, shared: u.Scheme != "mem"}, nil
}

func openFolderStore(u *url.URL) (*Store, error) {
	dir := u.Path
	switch u.Host {
	case "", "localhost":
	case ".": // gocloud's spelling of a relative path
		dir = "." + dir
	default:
		return nil, fmt.Errorf("blob store %s: host %q in a file URL; write file:///absolute/path", u, u.Host)
	}
	if dir == "" || dir == "." {
		return nil, fmt.Errorf("blob store %s: no path; write file:///absolute/path", u)
	}
	shared := false
	for key, values := range u.Query() {
		if key != "shared" || len(values) != 1 || values[0] != "true" && values[0] != "false" {
			return nil, fmt.Errorf("blob store %s: parameter %q; a file store knows only shared=true or shared=false", u, key)
		}
		shared = values[0] == "true"
	}
	f, err := openFolder(filepath.FromSlash(dir))
	if err != nil {
		return nil, fmt.Errorf("blob store %s: %w", u, explain(err))
	}
	bucket, err := fileblob.OpenBucket(f.root, &fileblob.Options{Metadata: fileblob.MetadataDontWrite})
	if err != nil {
		return nil, fmt.Errorf("blob store %s: %w", u, err)
	}
	return &Store{bucket: bucket, folder: f, shared: shared}, nil
}

// Close releases the connections to the bucket. Readers still open may fail.
func (s *Store) Close() error { return s.bucket.Close() }

// Shared reports whether several servers can use this store: any object storage, and a folder that its URL marks shared.
func (s *Store) Shared() bool { return s.shared }

// Put stores all that r yields and returns its digest and size in bytes. When it returns without error the blob is on
// stable storage and visible; else nothing of it is, and no temporary file is left. Bytes already stored are written
// again: that heals a damaged copy and renews ModTime, which protects them from a collection under way.
//
// More than limit bytes are ErrTooLarge, a full disk is ErrNoSpace; an error of r is returned wrapped. For object
// storage the bytes are staged in the system's temporary folder, as the name is known only at their end.
func (s *Store) Put(ctx context.Context, r io.Reader, limit int64) (Digest, int64, error) {
	if limit < 0 {
		return Digest{}, 0, fmt.Errorf("put blob: limit %d is negative; give the most bytes to accept", limit)
	}
	d, n, err := s.put(ctx, r, limit)
	switch {
	case errors.Is(err, errExcess):
		return Digest{}, 0, fmt.Errorf("put blob: %w: more than %d bytes", ErrTooLarge, limit)
	case err != nil:
		return Digest{}, 0, fmt.Errorf("put blob, after %d bytes: %w", n, explain(err))
	}
	return d, n, nil
}

func (s *Store) put(ctx context.Context, r io.Reader, limit int64) (d Digest, n int64, err error) {
	stage := stageUnnamed
	if s.folder != nil {
		stage = s.folder.stage
	}
	f, discard, err := stage()
	if err != nil {
		return d, 0, err
	}
	defer discard()
	hash := sha256.New()
	if n, err = copyBytes(ctx, io.MultiWriter(f, hash), r, limit); err != nil {
		return d, n, err
	}
	hash.Sum(d.sum[:0])
	if s.folder != nil {
		return d, n, s.folder.publish(f, key(d))
	}
	if _, err = f.Seek(0, io.SeekStart); err != nil {
		return d, n, err
	}
	return d, n, s.bucket.Upload(ctx, key(d), f, &blob.WriterOptions{ContentType: "application/octet-stream"})
}

// stageUnnamed makes a temporary file that has lost its name already, so that it vanishes with this process.
func stageUnnamed() (f *os.File, discard func(), err error) {
	if f, err = os.CreateTemp("", "blob-*"); err != nil {
		return nil, nil, err
	}
	if err = os.Remove(f.Name()); err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return f, func() { _ = f.Close() }, nil
}

// Open reads blob d from byte offset on, and returns the size in bytes of the whole blob. Offset may equal the size: the
// reader is then empty, as a download that resumes at its end expects. What is read is not verified: Cache does that at
// the place of use. The reader lives no longer than ctx and must be closed.
func (s *Store) Open(ctx context.Context, d Digest, offset int64) (io.ReadCloser, int64, error) {
	if offset < 0 {
		return nil, 0, fmt.Errorf("open blob %s at %d: %w", d, offset, ErrRange)
	}
	if offset > 0 { // object storage answers a range that starts at the end with an error of its own
		info, err := s.Stat(ctx, d)
		switch {
		case err != nil:
			return nil, 0, err
		case offset > info.Size:
			return nil, 0, fmt.Errorf("open blob %s at %d: %w, which has %d bytes", d, offset, ErrRange, info.Size)
		case offset == info.Size:
			return io.NopCloser(strings.NewReader("")), info.Size, nil
		}
	}
	r, err := s.bucket.NewRangeReader(ctx, key(d), offset, -1, nil)
	if err != nil {
		return nil, 0, fail("open", d, err)
	}
	return r, r.Size(), nil
}

// Stat returns what is known of blob d, or ErrNotFound.
func (s *Store) Stat(ctx context.Context, d Digest) (Info, error) {
	attrs, err := s.bucket.Attributes(ctx, key(d))
	if err != nil {
		return Info{}, fail("stat", d, err)
	}
	return Info{Digest: d, Size: attrs.Size, ModTime: attrs.ModTime}, nil
}

// Delete removes blob d, or returns ErrNotFound. Readers that have it open may finish or fail, by the kind of store.
func (s *Store) Delete(ctx context.Context, d Digest) error {
	remove := s.bucket.Delete
	if s.folder != nil {
		remove = s.folder.remove
	}
	if err := remove(ctx, key(d)); err != nil {
		return fail("delete", d, err)
	}
	return nil
}

// List yields every blob, in order of its digest, and ends after the first error. Blobs put or deleted meanwhile may be
// among them or not. What is not a blob's name is skipped.
func (s *Store) List(ctx context.Context) iter.Seq2[Info, error] {
	if s.folder != nil {
		return s.folder.list(ctx)
	}
	return func(yield func(Info, error) bool) {
		objects := s.bucket.List(&blob.ListOptions{Prefix: algorithm + "/"})
		for {
			o, err := objects.Next(ctx)
			if err == nil {
				err = context.Cause(ctx) // not every driver looks
			}
			switch {
			case errors.Is(err, io.EOF):
				return
			case err != nil:
				yield(Info{}, fmt.Errorf("list blobs: %w", err))
				return
			}
			d, ok := fromHex(path.Base(o.Key))
			if ok && o.Key == key(d) && !yield(Info{Digest: d, Size: o.Size, ModTime: o.ModTime}, nil) {
				return
			}
		}
	}
}

// key is where blob d lies in the bucket.
func key(d Digest) string {
	digits := d.Hex()
	return algorithm + "/" + digits[:2] + "/" + digits
}

func fail(verb string, d Digest, err error) error {
	if errors.Is(err, os.ErrNotExist) || gcerrors.Code(err) == gcerrors.NotFound {
		return fmt.Errorf("%s %w: %s", verb, ErrNotFound, d)
	}
	return fmt.Errorf("%s blob %s: %w", verb, d, err)
}

package blob

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"gocloud.dev/blob/fileblob"
)

// stores runs a test on every kind of store.
func stores(t *testing.T, test func(*testing.T, *Store)) {
	t.Run("file", func(t *testing.T) { test(t, mustOpenStore(t, "file://"+filepath.Join(t.TempDir(), "a", "b"))) })
	t.Run("mem", func(t *testing.T) { test(t, mustOpenStore(t, "mem://")) })
}

func blobs(tb testing.TB, s *Store) []Digest {
	tb.Helper()
	var all []Digest
	for info, err := range s.List(tb.Context()) {
		if err != nil {
			tb.Fatal(err)
		}
		if stat, err := s.Stat(tb.Context(), info.Digest); err != nil || stat.Size != info.Size || !stat.ModTime.Equal(info.ModTime) {
			tb.Errorf("List has %+v, Stat %+v, %v", info, stat, err)
		}
		all = append(all, info.Digest)
	}
	return all
}

func TestStoreReadsBackWhatWasPut(t *testing.T) {
	stores(t, func(t *testing.T, s *Store) {
		var want []Digest
		for i, n := range []int{0, 1, 511, 512, copyBuffer - 1, copyBuffer, copyBuffer + 1, 3 << 20} {
			b := random(uint64(i), n)
			d := mustPut(t, s, b)
			want = append(want, d)
			for _, offset := range []int64{0, 1, int64(n) / 2, int64(n) - 1, int64(n)} {
				if offset < 0 || offset > int64(n) {
					continue
				}
				r, size, err := s.Open(t.Context(), d, offset)
				if err != nil {
					t.Fatalf("Open of %d bytes at %d: %v", n, offset, err)
				}
				got, err := io.ReadAll(r)
				if err != nil || size != int64(n) || !bytes.Equal(got, b[offset:]) {
					t.Errorf("Open of %d bytes at %d: size %d, %d bytes, %v", n, offset, size, len(got), err)
				}
				if err := r.Close(); err != nil {
					t.Error(err)
				}
			}
			for _, offset := range []int64{-1, int64(n) + 1, math.MaxInt64, math.MinInt64} {
				if _, _, err := s.Open(t.Context(), d, offset); !errors.Is(err, ErrRange) {
					t.Errorf("Open of %d bytes at %d: %v, want ErrRange", n, offset, err)
				}
			}
		}
		slices.SortFunc(want, func(a, b Digest) int { return strings.Compare(a.Hex(), b.Hex()) })
		if got := blobs(t, s); !slices.Equal(got, want) {
			t.Errorf("List = %v, want %v", got, want)
		}
		for range s.List(t.Context()) {
			break // a caller may stop early
		}
	})
}

func TestStoreIsIdempotentAndHeals(t *testing.T) {
	stores(t, func(t *testing.T, s *Store) {
		b := random(1, 100_000)
		d := mustPut(t, s, b)
		first, err := s.Stat(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		if s.folder != nil { // damage it
			path := filepath.Join(s.folder.root, key(d))
			if err := errors.Join(os.Chmod(path, 0o600), os.WriteFile(path, []byte("bit rot"), 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		mustPut(t, s, b)
		again, err := s.Stat(t.Context(), d)
		if err != nil || again.Size != int64(len(b)) || !again.ModTime.After(first.ModTime) {
			t.Errorf("Stat = %+v, %v; want %d bytes, renewed after %s", again, err, len(b), first.ModTime)
		}
		if got := blobs(t, s); len(got) != 1 {
			t.Errorf("List = %v, want one blob", got)
		}
	})
}

func TestStoreDelete(t *testing.T) {
	stores(t, func(t *testing.T, s *Store) {
		keep, gone := mustPut(t, s, []byte("keep")), mustPut(t, s, []byte("gone"))
		if err := s.Delete(t.Context(), gone); err != nil {
			t.Fatal(err)
		}
		_, statErr := s.Stat(t.Context(), gone)
		_, _, openErr := s.Open(t.Context(), gone, 0)
		_, _, offsetErr := s.Open(t.Context(), gone, 1)
		for _, err := range []error{statErr, openErr, offsetErr, s.Delete(t.Context(), gone)} {
			if !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), gone.String()) {
				t.Errorf("after Delete: %v, want ErrNotFound naming the digest", err)
			}
		}
		if got := blobs(t, s); !slices.Equal(got, []Digest{keep}) {
			t.Errorf("List = %v, want %v", got, keep)
		}
	})
}

func TestPutThatFailsLeavesNothing(t *testing.T) {
	broken := errors.New("connection reset")
	b := random(1, 1_000_000)
	cancelled := func(ctx context.Context) (context.Context, io.Reader) {
		ctx, cancel := context.WithCancel(ctx)
		return ctx, io.MultiReader(bytes.NewReader(b), readerFunc(func([]byte) (int, error) {
			cancel()
			return 0, nil
		}))
	}
	for name, test := range map[string]struct {
		input func(context.Context) (context.Context, io.Reader)
		limit int64
		want  error
	}{
		"one too many":     {limit: int64(len(b)) - 1, want: ErrTooLarge},
		"limit zero":       {limit: 0, want: ErrTooLarge},
		"broken reader":    {limit: math.MaxInt64, want: broken, input: failing(b, broken)},
		"broken past end":  {limit: int64(len(b)), want: broken, input: failing(b, broken)},
		"context is done":  {limit: math.MaxInt64, want: context.Canceled, input: cancelled},
		"negative limit":   {limit: -1},
		"silent and stuck": {limit: math.MaxInt64, want: io.ErrNoProgress, input: failing(b, io.ErrNoProgress)},
	} {
		t.Run(name, func(t *testing.T) {
			stores(t, func(t *testing.T, s *Store) {
				t.Setenv("TMPDIR", t.TempDir())
				ctx, r := t.Context(), io.Reader(bytes.NewReader(b))
				if test.input != nil {
					ctx, r = test.input(ctx)
				}
				d, n, err := s.Put(ctx, r, test.limit)
				if err == nil || test.want != nil && !errors.Is(err, test.want) || d != (Digest{}) || n != 0 {
					t.Errorf("Put = %s, %d, %v; want only %v", d, n, err, test.want)
				}
				if got := blobs(t, s); len(got) != 0 {
					t.Errorf("List = %v, want nothing", got)
				}
				if got := leftovers(t, s); len(got) != 0 {
					t.Errorf("left behind: %v", got)
				}
			})
		})
	}
}

// failing yields b and then err.
func failing(b []byte, err error) func(context.Context) (context.Context, io.Reader) {
	return func(ctx context.Context) (context.Context, io.Reader) {
		return ctx, io.MultiReader(bytes.NewReader(b), iotest.ErrReader(err))
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// leftovers lists staged files.
func leftovers(tb testing.TB, s *Store) []string {
	tb.Helper()
	dir := os.TempDir()
	if s.folder != nil {
		dir = s.folder.staging()
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		tb.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if e.Name() != stagingLock {
			names = append(names, e.Name())
		}
	}
	return names
}

func TestPutAtTheLimit(t *testing.T) {
	stores(t, func(t *testing.T, s *Store) {
		for _, n := range []int{0, 1, copyBuffer, 100_000} {
			b := random(7, n)
			d, size, err := s.Put(t.Context(), iotest.OneByteReader(bytes.NewReader(b)), int64(n))
			if err != nil || d != Sum(b) || size != int64(n) {
				t.Errorf("Put of %d bytes with that limit = %s, %d, %v", n, d, size, err)
			}
		}
	})
}

func TestStoreConcurrently(t *testing.T) {
	stores(t, func(t *testing.T, s *Store) {
		same := random(99, 200_000)
		var wg sync.WaitGroup
		for i := range 16 {
			wg.Go(func() {
				own := random(uint64(i), 50_000+i)
				for _, b := range [][]byte{same, own} {
					d, _, err := s.Put(t.Context(), bytes.NewReader(b), math.MaxInt64)
					if err != nil {
						t.Error(err)
						return
					}
					r, _, err := s.Open(t.Context(), d, 0)
					if err != nil {
						t.Error(err)
						return
					}
					got, err := io.ReadAll(r)
					if r.Close(); err != nil || !bytes.Equal(got, b) {
						t.Errorf("read back %d bytes, %v; want %d", len(got), err, len(b))
					}
				}
				for _, err := range s.List(t.Context()) {
					if err != nil {
						t.Error(err)
					}
				}
				if err := s.Delete(t.Context(), Sum(own)); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if got := blobs(t, s); !slices.Equal(got, []Digest{Sum(same)}) {
			t.Errorf("List = %v, want only %s", got, Sum(same))
		}
	})
}

func TestOpenStoreComplains(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for url, complaint := range map[string]string{
		"nosuch://bucket":              "no driver registered",
		"file://":                      "no path",
		"file://.":                     "no path",
		"file://data/blobs":            `host "data"`,
		"file:///x?region=eu":          `parameter "region"`,
		"file:///x?shared=yes":         `parameter "shared"`,
		"file://" + file:               "not a directory",
		"file://" + file + "/below":    "not a directory",
		"%":                            "invalid URL",
		"nosuch://user:secret@bucket/": "no driver registered",
	} {
		if s, err := OpenStore(t.Context(), url); err == nil || !strings.Contains(err.Error(), complaint) {
			t.Errorf("OpenStore(%q) = %v, %v; want an error about %q", url, s, err, complaint)
		}
	}
}

func TestShared(t *testing.T) {
	dir := t.TempDir()
	for url, want := range map[string]bool{
		"mem://":                          false,
		"file://" + dir:                   false,
		"file://localhost" + dir:          false,
		"file://" + dir + "?shared=false": false,
		"file://" + dir + "?shared=true":  true,
	} {
		if got := mustOpenStore(t, url).Shared(); got != want {
			t.Errorf("OpenStore(%q).Shared() = %t", url, got)
		}
	}
}

func TestFileStoreIsPlain(t *testing.T) {
	root := filepath.Join(t.TempDir(), "store")
	s := mustOpenStore(t, "file://"+root)
	b := random(3, 5000)
	d := mustPut(t, s, b)
	info, err := os.Stat(filepath.Join(root, "sha256", d.Hex()[:2], d.Hex()))
	if err != nil || info.Mode() != 0o444 {
		t.Errorf("the blob's file: %v, %v; want mode 0444", info, err)
	}
	plain, err := fileblob.OpenBucket(root, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	if got, err := plain.ReadAll(t.Context(), key(d)); err != nil || !bytes.Equal(got, b) {
		t.Errorf("read through another gocloud bucket: %d bytes, %v", len(got), err)
	}
}

func TestListSkipsStrangers(t *testing.T) {
	root := t.TempDir()
	s := mustOpenStore(t, "file://"+root)
	d := mustPut(t, s, []byte("abc"))
	for _, name := range []string{
		"sha256/README", "sha256/ba/README", "sha256/zz/" + d.Hex(), "sha256/ba/" + strings.ToUpper(d.Hex()),
		"sha256/ba/" + Sum([]byte("elsewhere")).Hex(), "other/ba/" + d.Hex(),
	} {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	bucket, err := fileblob.OpenBucket(root, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer bucket.Close()
	for _, s := range []*Store{s, {bucket: bucket}} {
		if got := blobs(t, s); !slices.Equal(got, []Digest{d}) {
			t.Errorf("List = %v, want only %s", got, d)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, s := range []*Store{s, {bucket: bucket}} {
		for info, err := range s.List(ctx) {
			if !errors.Is(err, context.Canceled) {
				t.Errorf("List with a context that is done yields %+v, %v", info, err)
			}
		}
	}
}

func TestKilledPut(t *testing.T) {
	url := "file://" + t.TempDir()
	half := random(5, 600_000)
	dying, living := mustStart(t, "put", url), mustStart(t, "put", url)
	dying.feed(t, half)
	living.feed(t, half)

	s := mustOpenStore(t, url)
	if got := leftovers(t, s); len(got) != 2 {
		t.Fatalf("staged files: %v, want those of the two writers at work", got)
	}
	if got := blobs(t, s); len(got) != 0 {
		t.Errorf("List = %v before anything is complete", got)
	}
	dying.kill()
	mustOpenStore(t, url)
	if got := leftovers(t, s); len(got) != 1 {
		t.Errorf("staged files: %v, want that of the living writer only", got)
	}
	if got := living.last(t); got != Sum(half).String() {
		t.Errorf("the living writer got %q, want %s", got, Sum(half))
	}
	if got := blobs(t, s); !slices.Equal(got, []Digest{Sum(half)}) {
		t.Errorf("List = %v, want %s", got, Sum(half))
	}
	if got := leftovers(t, s); len(got) != 0 {
		t.Errorf("staged files: %v, want none", got)
	}
}

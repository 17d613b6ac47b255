package registry

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rxvision/rxvision/blob"
	"github.com/rxvision/rxvision/cluster"
)

// memStore applies commands to a real state, one after another.
type memStore struct {
	mu    sync.Mutex
	state *cluster.State
	index uint64
	fail  error
}

func (m *memStore) State() *cluster.State { return m.state }

func (m *memStore) Apply(_ context.Context, c cluster.Command) (cluster.Result, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		return cluster.Result{}, m.fail
	}
	m.index++
	*cluster.StampOf(c) = cluster.Stamp{RequestID: fmt.Sprint(m.index), Time: int64(m.index)}
	res, err := m.state.Apply(m.index, cluster.EncodeCommand(c))
	if err == nil && res.Err != nil {
		err = res.Err
	}
	return res, err
}

// checker refuses artifacts whose bytes begin with "bad"; it reads them as a node would.
type checker struct{ blobs *blob.Store }

func (c checker) CheckModel(ctx context.Context, digest string, size int64) (*cluster.ModelVersion, error) {
	d, err := blob.ParseDigest(digest)
	if err != nil {
		return nil, err
	}
	r, _, err := c.blobs.Open(ctx, d, 0)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	if int64(len(b)) != size {
		return nil, fmt.Errorf("read %d of %d bytes", len(b), size)
	}
	if strings.HasPrefix(string(b), "bad") {
		return nil, cluster.Errorf(cluster.CodeInvalid, "the file is not an ONNX model")
	}
	return &cluster.ModelVersion{Platform: "onnxruntime_onnx", Inputs: []cluster.TensorSpec{{Name: "x", Datatype: "FP32", Shape: []int64{-1}}}}, nil
}

func newRegistry(t *testing.T) (*Registry, *memStore) {
	blobs, err := blob.OpenStore(t.Context(), "file://"+t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { blobs.Close() })
	store := &memStore{state: cluster.NewState()}
	return New(Config{Store: store, Blobs: blobs, Checker: checker{blobs}, MaxModel: 1 << 20, Logger: slog.New(slog.DiscardHandler)}), store
}

func count(t *testing.T, b *blob.Store) (n int) {
	for _, err := range b.List(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		n++
	}
	return n
}

func TestPushRecordsVersions(t *testing.T) {
	r, store := newRegistry(t)
	for i, body := range []string{"one", "two", "one"} {
		v, err := r.Push(t.Context(), "fashion", "d", nil, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if want := []uint64{1, 2, 1}[i]; v.Version != want || v.Size != 3 || v.Inputs[0].Name != "x" {
			t.Errorf("push %d: %+v, want version %d", i, v, want)
		}
		rc, size, err := r.Open(t.Context(), v.Digest, 1)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(rc)
		rc.Close()
		if size != 3 || string(b) != body[1:] {
			t.Errorf("artifact from 1: %q of %d", b, size)
		}
	}
	if err := r.SetAlias(t.Context(), "fashion", "production", 2); err != nil {
		t.Fatal(err)
	}
	if m := store.state.Snapshot().Model(nil, "fashion"); m.Aliases["production"] != 2 || m.LatestVersion != 2 {
		t.Errorf("model %+v", m)
	}
}

func TestRefusedPushLeavesNothing(t *testing.T) {
	r, store := newRegistry(t)
	if _, err := r.Push(t.Context(), "kept", "", nil, strings.NewReader("good")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, body string
		code       cluster.Code
	}{
		{"fashion", "bad file", cluster.CodeInvalid},
		{"fashion", "", cluster.CodeInvalid},
		{"-x/../y", "good", cluster.CodeInvalid},
		{"fashion", strings.Repeat("x", 2<<20), cluster.CodeTooLarge},
	} {
		if _, err := r.Push(t.Context(), c.name, "", nil, strings.NewReader(c.body)); cluster.CodeOf(err) != c.code {
			t.Errorf("push %q of %d bytes: %v, want code %s", c.name, len(c.body), err, c.code)
		}
	}
	store.fail = cluster.ErrNoLeader
	if _, err := r.Push(t.Context(), "fashion", "", nil, strings.NewReader("new")); cluster.CodeOf(err) != cluster.CodeNoLeader {
		t.Errorf("push without a leader: %v", err)
	}
	if n := count(t, r.cfg.Blobs); n != 1 {
		t.Errorf("%d blobs are kept, want the recorded one only", n)
	}
	if ms := store.state.Snapshot().Models(nil); len(ms) != 1 {
		t.Errorf("models: %+v", ms)
	}
	if _, _, err := r.Open(t.Context(), "sha256:"+strings.Repeat("1", 64), 0); cluster.CodeOf(err) != cluster.CodeNotFound {
		t.Errorf("unknown artifact: %v", err)
	}
}

func TestSweepDeletesWhatNobodyNames(t *testing.T) {
	dir := t.TempDir()
	blobs, err := blob.OpenStore(t.Context(), "file://"+dir)
	if err != nil {
		t.Fatal(err)
	}
	defer blobs.Close()
	r := New(Config{Store: &memStore{state: cluster.NewState()}, Blobs: blobs, Checker: checker{blobs}, Logger: slog.New(slog.DiscardHandler)})
	if _, err := r.Push(t.Context(), "kept", "", nil, strings.NewReader("good")); err != nil {
		t.Fatal(err)
	}
	for _, body := range []string{"orphan, old", "orphan, young"} {
		if _, _, err := blobs.Put(t.Context(), strings.NewReader(body), 100); err != nil {
			t.Fatal(err)
		}
	}
	young := blob.Sum([]byte("orphan, young")).Hex()
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.Contains(path, young) {
			return err
		}
		old := time.Now().Add(-2 * sweepAge)
		return os.Chtimes(path, old, old)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := count(t, blobs); n != 2 {
		t.Errorf("%d blobs are left, want the recorded and the young one", n)
	}
}

func TestConcurrentPushOfOneArtifact(t *testing.T) {
	r, _ := newRegistry(t)
	var wg sync.WaitGroup
	for i := range MaxPushes {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if _, err := r.Push(t.Context(), fmt.Sprintf("m%d", i%2), "", nil, strings.NewReader("same bytes")); err != nil {
				t.Error(err)
			}
		}()
	}
	wg.Wait()
	if n := count(t, r.cfg.Blobs); n != 1 {
		t.Errorf("%d blobs, want 1", n)
	}
}

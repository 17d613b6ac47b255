package api_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"sync"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/cluster"
)

// fakeModels is a registry that keeps bytes in memory and finds every model good
// that does not say otherwise.
type fakeModels struct {
	store api.Store
	mu    sync.Mutex
	blobs map[string][]byte
}

func newFakeModels(store api.Store) *fakeModels {
	return &fakeModels{store: store, blobs: map[string][]byte{}}
}

func (f *fakeModels) Push(ctx context.Context, name, description string, origin *cluster.ModelOrigin, body io.Reader) (*cluster.ModelVersion, error) {
	b, err := io.ReadAll(body)
	if err != nil {
		return nil, err
	}
	if bytes.HasPrefix(b, []byte("bad")) {
		return nil, cluster.Errorf(cluster.CodeInvalid, "the file is no ONNX model")
	}
	sum := sha256.Sum256(b)
	digest := "sha256:" + hex.EncodeToString(sum[:])
	f.mu.Lock()
	f.blobs[digest] = b
	f.mu.Unlock()
	res, err := f.store.Apply(ctx, &cluster.CreateModelVersion{Description: description, Version: &cluster.ModelVersion{
		Model: name, Digest: digest, Size: int64(len(b)), Platform: "onnxruntime_onnx", Origin: origin,
		Inputs: []cluster.TensorSpec{{Name: "x", Datatype: "FP32", Shape: []int64{-1, 4}}},
	}})
	if err != nil {
		return nil, err
	}
	return f.store.State().Snapshot().ModelVersion(nil, name, res.Version), nil
}

func (f *fakeModels) SetAlias(ctx context.Context, model, alias string, version uint64) error {
	_, err := f.store.Apply(ctx, &cluster.SetAlias{Model: model, Alias: alias, Version: version})
	return err
}

func (f *fakeModels) Open(_ context.Context, digest string, offset int64) (io.ReadCloser, int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	b, ok := f.blobs[digest]
	if !ok {
		return nil, 0, cluster.Errorf(cluster.CodeNotFound, "no artifact %s", digest)
	}
	return io.NopCloser(bytes.NewReader(b[offset:])), int64(len(b)), nil
}

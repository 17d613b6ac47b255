// Package registry is the workflow around models: take an artifact's bytes, have
// them checked on a node, and record the version in the replicated state.
//
// The bytes are durable before the record names them, and a version that failed
// its check leaves neither record nor bytes. Servers never load a model.
package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/rxvision/rxvision/blob"
	"github.com/rxvision/rxvision/cluster"
)

// DefaultMaxModel bounds one artifact, in bytes.
const DefaultMaxModel = 16 << 30

// MaxPushes bounds the pushes under way on one server.
const MaxPushes = 8

// Store is what the registry needs of the replicated store.
type Store interface {
	Apply(ctx context.Context, cmd cluster.Command) (cluster.Result, error)
	State() *cluster.State
}

// Checker loads an artifact in a limited process on some node and gives what it
// read: platform, inputs, outputs and properties. Its error is one sentence.
type Checker interface {
	CheckModel(ctx context.Context, digest string, size int64) (*cluster.ModelVersion, error)
}

// Config is what a Registry is made of; MaxModel 0 means DefaultMaxModel.
type Config struct {
	Store    Store
	Blobs    *blob.Store
	Checker  Checker
	MaxModel int64
	Logger   *slog.Logger
}

// Registry takes models in and gives their artifacts out.
type Registry struct {
	cfg   Config
	slots chan struct{}

	mu      sync.Mutex
	pending map[blob.Digest]int // pushes that hold a digest not yet recorded
}

// New makes a registry.
func New(cfg Config) *Registry {
	if cfg.MaxModel == 0 {
		cfg.MaxModel = DefaultMaxModel
	}
	return &Registry{cfg: cfg, slots: make(chan struct{}, MaxPushes), pending: map[blob.Digest]int{}}
}

// Push stores body as the next version of a model, creating the model if it is
// new. origin is the work that made it, nil when nobody says. The same bytes again give
// the version that holds them. It changes nothing when the body is over the limit
// (CodeTooLarge), is no model that a node can load (CodeInvalid), no node can check it
// now (CodeUnavailable), or its origin is not known (CodeNotFound).
func (r *Registry) Push(ctx context.Context, name, description string, origin *cluster.ModelOrigin, body io.Reader) (*cluster.ModelVersion, error) {
	if err := cluster.ValidModelName(name); err != nil {
		return nil, err
	}
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
	default:
		return nil, cluster.Errorf(cluster.CodeUnavailable, "%d models are being pushed to this server already; try again in a moment", MaxPushes)
	}
	digest, size, err := r.cfg.Blobs.Put(ctx, body, r.cfg.MaxModel)
	switch {
	case errors.Is(err, blob.ErrTooLarge):
		return nil, cluster.Errorf(cluster.CodeTooLarge, "the model is larger than this server's limit of %d bytes", r.cfg.MaxModel)
	case errors.Is(err, blob.ErrNoSpace):
		r.cfg.Logger.Warn("a model did not fit on the disk", "model", name, "error", err)
		return nil, cluster.Errorf(cluster.CodeUnavailable, "the disk of the server's model store is full: nothing was stored; free some space and try again")
	case err != nil:
		return nil, cluster.Errorf(cluster.CodeUnavailable, "the model could not be stored: %v", err)
	}
	r.hold(digest)
	defer r.release(digest)
	// Another push of the same bytes may have let go of them, and so deleted them,
	// before they were held here.
	if _, err := r.cfg.Blobs.Stat(ctx, digest); err != nil {
		return nil, cluster.Errorf(cluster.CodeUnavailable, "the model could not be stored: %v", err)
	}
	if size == 0 {
		return nil, cluster.Errorf(cluster.CodeInvalid, "the model file is empty")
	}
	if v := r.version(name, digest.String()); v != nil {
		return v, nil
	}
	version, err := r.cfg.Checker.CheckModel(ctx, digest.String(), size)
	if err != nil {
		return nil, err
	}
	version.Model, version.Version, version.Digest, version.Size, version.Origin = name, 0, digest.String(), size, origin
	res, err := r.cfg.Store.Apply(ctx, &cluster.CreateModelVersion{Version: version, Description: description})
	if err != nil {
		return nil, err
	}
	v := r.cfg.Store.State().Snapshot().ModelVersion(nil, name, res.Version)
	if v == nil {
		return nil, cluster.Errorf(cluster.CodeInternal, "version %d of model %q is not in the state after it was recorded", res.Version, name)
	}
	r.cfg.Logger.Info("model version recorded", "model", name, "version", v.Version, "digest", v.Digest, "bytes", v.Size)
	return v, nil
}

// SetAlias points an alias at a version; version 0 removes it. Jobs that follow
// the alias get a new version in the same log entry.
func (r *Registry) SetAlias(ctx context.Context, model, alias string, version uint64) error {
	_, err := r.cfg.Store.Apply(ctx, &cluster.SetAlias{Model: model, Alias: alias, Version: version})
	return err
}

// Open gives an artifact's bytes from an offset, and its whole size. The digest
// must be one that the state names or that is being checked.
func (r *Registry) Open(ctx context.Context, digest string, offset int64) (io.ReadCloser, int64, error) {
	d, err := blob.ParseDigest(digest)
	if err != nil {
		return nil, 0, cluster.Errorf(cluster.CodeInvalid, "%v", err)
	}
	rc, size, err := r.cfg.Blobs.Open(ctx, d, offset)
	switch {
	case errors.Is(err, blob.ErrNotFound):
		return nil, 0, cluster.Errorf(cluster.CodeNotFound, "no artifact %s", digest)
	case errors.Is(err, blob.ErrRange):
		return nil, 0, cluster.Errorf(cluster.CodeInvalid, "offset %d is outside artifact %s", offset, digest)
	}
	return rc, size, err
}

// Sweep deletes the bytes that no version names, no push holds and that have not
// been written for an hour: what a server left that was killed between storing a
// model and recording it. The state must be complete: call it on a leader only.
func (r *Registry) Sweep(ctx context.Context) error {
	before := time.Now().Add(-sweepAge)
	for info, err := range r.cfg.Blobs.List(ctx) {
		if err != nil {
			return fmt.Errorf("list the model store: %w", err)
		}
		if info.ModTime.After(before) {
			continue
		}
		r.hold(info.Digest)
		r.release(info.Digest)
	}
	return nil
}

const sweepAge = time.Hour

func (r *Registry) hold(d blob.Digest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pending[d]++
}

// release deletes the bytes when no version names them and no other push holds them.
func (r *Registry) release(d blob.Digest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.pending[d]--; r.pending[d] > 0 {
		return
	}
	delete(r.pending, d)
	if r.recorded(d.String()) {
		return
	}
	if err := r.cfg.Blobs.Delete(context.Background(), d); err != nil && !errors.Is(err, blob.ErrNotFound) {
		r.cfg.Logger.Warn("bytes of a refused model could not be deleted", "digest", d.String(), "error", err)
	}
}

// version finds the version of a model that holds a digest; nil when none does.
func (r *Registry) version(model, digest string) *cluster.ModelVersion {
	for _, v := range r.cfg.Store.State().Snapshot().ModelVersions(nil, model) {
		if v.Digest == digest {
			return v
		}
	}
	return nil
}

func (r *Registry) recorded(digest string) bool {
	for _, m := range r.cfg.Store.State().Snapshot().Models(nil) {
		if r.version(m.Name, digest) != nil {
			return true
		}
	}
	return false
}

package gateway

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
	"github.com/rxvision/rxvision/oip"
	"github.com/rxvision/rxvision/vision"
)

// endpoint is one replica. It outlives tables, so that its counts do.
type endpoint struct {
	alloc, address string
	inFlight       atomic.Int64
	ejectedUntil   atomic.Int64 // unix nanoseconds
	queue          queue
}

func (e *endpoint) usable(now time.Time) bool { return e.ejectedUntil.Load() <= now.UnixNano() }

// version is one version of a model with its ready replicas.
type version struct {
	number    uint64
	metadata  oip.ModelMetadata
	images    *vision.Record // nil: the model takes no images
	imagesErr error
	ready     []*endpoint
	starting  int  // live replicas that are not ready
	wakes     bool // replicas come when somebody waits
}

type model struct {
	name     string
	aliases  map[string]uint64
	versions []*version // newest first
}

// table is one immutable picture of all routes; changed is closed when a newer
// one takes its place.
type table struct {
	models  map[string]*model
	known   bool // routes were heard or read from disk
	changed chan struct{}
}

// find gives the versions that a request may be answered by, best first. Ref is
// "", a number or an alias.
func (t *table) find(name, ref string) ([]*version, *oip.Error) {
	m := t.models[name]
	if m == nil {
		if !t.known {
			return nil, oip.Errorf(503, "this gateway has not heard from a server yet and knows no routes")
		}
		return nil, oip.Errorf(404, "unknown model %q", clip(name))
	}
	if ref == "" {
		return m.versions, nil
	}
	number, isAlias := m.aliases[ref]
	if !isAlias {
		n, err := strconv.ParseUint(ref, 10, 64)
		if err != nil {
			return nil, oip.Errorf(404, "model %q has no version or alias %q", name, clip(ref))
		}
		number = n
	}
	i := slices.IndexFunc(m.versions, func(v *version) bool { return v.number == number })
	if i < 0 {
		return nil, oip.Errorf(404, "model %q has no version %q", name, clip(ref))
	}
	return m.versions[i : i+1], nil
}

// pick chooses the replica with the least work in flight of the newest version
// that has one; turn breaks ties. Nil when none is usable.
func pick(versions []*version, skip []*endpoint, turn uint64, now time.Time) (*version, *endpoint) {
	for _, v := range versions {
		var best *endpoint
		var least int64
		n := uint64(len(v.ready))
		for i := range n {
			e := v.ready[(turn+i)%n]
			if !e.usable(now) || slices.Contains(skip, e) {
				continue
			}
			if w := e.inFlight.Load(); best == nil || w < least {
				best, least = e, w
			}
		}
		if best != nil {
			return v, best
		}
	}
	return nil, nil
}

// served is the version to describe: the newest with replicas, else the newest.
func served(versions []*version) *version {
	for _, v := range versions {
		if len(v.ready) > 0 {
			return v
		}
	}
	for _, v := range versions {
		if v.starting > 0 {
			return v
		}
	}
	return versions[0]
}

// unserved says in one sentence why no replica can answer, and whether waiting
// for a change of routes may help.
func unserved(name string, versions []*version) (*oip.Error, bool) {
	ready, starting, wakes := 0, 0, false
	for _, v := range versions {
		ready += len(v.ready)
		starting += v.starting
		wakes = wakes || v.wakes
	}
	switch {
	case ready > 0:
		return oip.Errorf(503, "model %q: none of its %d replicas answers; they are tried again", name, ready), true
	case starting > 0:
		return oip.Errorf(503, "model %q: %d replicas are starting, none is ready yet", name, starting), true
	case wakes:
		return oip.Errorf(503, "model %q: a replica was asked for and is not there yet", name), true
	}
	return oip.Errorf(503, "model %q is registered, but no job serves it; run a job with an onnx task for it", name), false
}

// router keeps the table true.
type router struct {
	current atomic.Pointer[table]
	file    string // where the last routes are kept; "" for nowhere
	routes  map[string]*pb.ModelRoute
	reuse   map[string]*endpoint // by allocation and address
}

func newRouter(file string) (*router, error) {
	r := &router{file: file, routes: map[string]*pb.ModelRoute{}, reuse: map[string]*endpoint{}}
	r.current.Store(&table{changed: make(chan struct{})})
	if file == "" {
		return r, nil
	}
	b, err := os.ReadFile(file)
	if os.IsNotExist(err) {
		return r, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the kept routes: %w", err)
	}
	u := new(pb.RoutesUpdate)
	if err := proto.Unmarshal(b, u); err != nil || !u.Full || r.apply(u) != nil {
		clear(r.routes) // a torn file, or one of another version, is worth nothing; the servers tell all again
	}
	return r, nil
}

// apply takes an update over and wakes whoever waits for a change.
func (r *router) apply(u *pb.RoutesUpdate) error {
	if u.Full {
		clear(r.routes)
	}
	for _, m := range u.Models {
		r.routes[m.Name] = m
	}
	for _, name := range u.Gone {
		delete(r.routes, name)
	}
	next := &table{models: make(map[string]*model, len(r.routes)), known: true, changed: make(chan struct{})}
	reuse := map[string]*endpoint{}
	for name, route := range r.routes {
		m, err := r.model(route, reuse)
		if err != nil {
			return fmt.Errorf("routes of model %s: %w", name, err)
		}
		next.models[name] = m
	}
	r.reuse = reuse
	old := r.current.Swap(next)
	close(old.changed)
	return nil
}

func (r *router) model(route *pb.ModelRoute, reuse map[string]*endpoint) (*model, error) {
	m := &model{name: route.Name, aliases: route.Aliases}
	for _, vr := range route.Versions {
		rec := new(cluster.ModelVersion)
		if err := cluster.Unmarshal(vr.Record, rec); err != nil {
			return nil, err
		}
		v := &version{number: vr.Version, metadata: metadataOf(rec), wakes: vr.Wakes}
		v.images, v.imagesErr = vision.Parse(v.metadata)
		for _, ep := range vr.Endpoints {
			if !ep.Ready {
				v.starting++
				continue
			}
			key := ep.AllocId + " " + ep.Address
			e := r.reuse[key]
			if e == nil {
				e = &endpoint{alloc: ep.AllocId, address: ep.Address}
			}
			reuse[key] = e
			v.ready = append(v.ready, e)
		}
		m.versions = append(m.versions, v)
	}
	return m, nil
}

func metadataOf(v *cluster.ModelVersion) oip.ModelMetadata {
	tensors := func(specs []cluster.TensorSpec) []oip.TensorMetadata {
		out := make([]oip.TensorMetadata, len(specs))
		for i, s := range specs {
			out[i] = oip.TensorMetadata{Name: s.Name, Datatype: oip.Datatype(s.Datatype), Shape: s.Shape}
		}
		return out
	}
	return oip.ModelMetadata{
		Name: v.Model, Versions: []string{strconv.FormatUint(v.Version, 10)}, Platform: v.Platform,
		Inputs: tensors(v.Inputs), Outputs: tensors(v.Outputs), Properties: v.Properties,
	}
}

// save keeps the routes on disk, replaced as a whole.
func (r *router) save() error {
	if r.file == "" {
		return nil
	}
	u := &pb.RoutesUpdate{Full: true}
	for _, m := range r.routes {
		u.Models = append(u.Models, m)
	}
	b, err := proto.Marshal(u)
	if err != nil {
		return err
	}
	tmp := r.file + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, r.file)
}

// maxParts bounds the bytes of routes that are gathered until they are whole.
const maxParts = 256 << 20

// watch follows a server's routes until the stream breaks. Updates in parts are
// taken over when they are whole: a half of all routes would look like the end of
// the other half.
func (r *router) watch(ctx context.Context, conn grpc.ClientConnInterface, name string, saved func(error)) error {
	stream, err := pb.NewFleetClient(conn).Routes(ctx, &pb.RoutesRequest{Gateway: name}, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	var whole *pb.RoutesUpdate
	size := 0
	for {
		u, err := stream.Recv()
		if err != nil {
			return err
		}
		if size += proto.Size(u); size > maxParts {
			return fmt.Errorf("the server sends an update of routes of more than %d bytes", maxParts)
		}
		if whole == nil {
			whole = u
		} else {
			whole.Models, whole.Gone = append(whole.Models, u.Models...), append(whole.Gone, u.Gone...)
		}
		if u.More {
			continue
		}
		if err := r.apply(whole); err != nil {
			return err
		}
		whole, size = nil, 0
		saved(r.save())
	}
}

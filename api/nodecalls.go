package api

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"time"
	"unicode/utf8"

	"github.com/rxvision/rxvision/cluster"
)

// Nodes carries calls to nodes. An error has CodeUnavailable when the node cannot
// be reached, CodeNotFound when it does not know the allocation, task or file.
type Nodes interface {
	Logs(ctx context.Context, nodeID string, req LogsRequest) (Frames, error)
	// File reads an allocation's directory. stat and ls answer one frame of JSON;
	// read gives the bytes, stream follows the file.
	File(ctx context.Context, nodeID string, req FileRequest) (Frames, error)
	// NodeStats answers in the shape of /v1/client/stats.
	NodeStats(ctx context.Context, nodeID string) (json.RawMessage, error)
	// AllocStats answers in the shape of /v1/client/allocation/:id/stats; task ""
	// means all.
	AllocStats(ctx context.Context, nodeID, allocID, task string) (json.RawMessage, error)
	// Checks answers in the shape of /v1/client/allocation/:id/checks.
	Checks(ctx context.Context, nodeID, allocID string) (json.RawMessage, error)
	Restart(ctx context.Context, nodeID string, req RestartRequest) error
	Signal(ctx context.Context, nodeID string, req SignalRequest) error
}

// Frames is what a node sends, piece by piece. Next gives io.EOF at the end. Close
// ends the call, and a Next that waits.
type Frames interface {
	Next() (Frame, error)
	Close()
}

// Frame is a piece of a log or file.
type Frame struct {
	Data      []byte
	File      string // that Data is from
	Offset    int64  // within File, after Data
	FileEvent string // "file deleted" or "file truncated"
}

// LogsRequest asks for a task's log.
type LogsRequest struct {
	AllocID, Task string
	Type          string // stdout or stderr
	Follow        bool
	Origin        string // start or end
	Offset        int64  // bytes from the origin
}

// FileRequest asks for something of an allocation's directory.
type FileRequest struct {
	AllocID string
	Op      string // stat, ls, read or stream
	Path    string
	Origin  string
	Offset  int64
	Limit   int64 // bytes; -1: to the end
	Follow  bool
}

// RestartRequest restarts a task in place; without a task those that run, with
// AllTasks those that have ended too.
type RestartRequest struct {
	AllocID, Task string
	AllTasks      bool
}

// SignalRequest sends a signal to a task, or to all.
type SignalRequest struct{ AllocID, Task, Signal string }

// Streams of frames.
const (
	// maxFrame bounds the data of one frame, in bytes.
	maxFrame = 64 << 10
	// heartbeat is how often a stream shows that it is alive; the first time sooner,
	// since clients wait for an answer's head, but not at once, since a node's refusal
	// needs it for its status.
	heartbeat = time.Second
	firstBeat = 100 * time.Millisecond
)

// allocOf finds the allocation that the route names, for calls to its node.
func (s *Server) allocOf(r *request) (*cluster.Allocation, error) {
	if s.cfg.Nodes == nil {
		return nil, notBuilt("this server has no way to nodes")
	}
	if err := s.fresh(r); err != nil {
		return nil, err
	}
	a := s.cfg.Store.State().Snapshot().Alloc(nil, r.params["id"])
	if a == nil {
		return nil, notFound("Unknown allocation %q", r.params["id"])
	}
	return a, r.allow(a.Namespace, "")
}

func (s *Server) logs(r *request) (any, error) {
	req := LogsRequest{AllocID: r.params["id"], Task: r.query.Get("task"), Type: r.query.Get("type")}
	if req.Task == "" {
		return nil, badRequest("must provide task name")
	}
	if req.Type != "stdout" && req.Type != "stderr" {
		return nil, badRequest("must provide log type stdout/stderr")
	}
	var err error
	if req.Follow, err = r.flag("follow", true); err != nil {
		return nil, err
	}
	plain, err := r.flag("plain", true)
	if err != nil {
		return nil, err
	}
	if req.Origin, req.Offset, err = r.offset(); err != nil {
		return nil, err
	}
	a, err := s.allocOf(r)
	if err != nil {
		return nil, err
	}
	if j := jobOf(s.cfg.Store.State().Snapshot(), a); j.Group(a.TaskGroup).Task(req.Task) == nil {
		return nil, notFound("task %q is not part of the allocation", req.Task)
	}
	frames, err := s.cfg.Nodes.Logs(r.Context(), a.NodeID, req)
	if err != nil {
		return nil, err
	}
	if plain {
		return raw(frames, "text/plain; charset=utf-8"), nil
	}
	return framed(r.Context(), frames, "application/json"), nil
}

// offset reads where a stream begins.
func (r *request) offset() (origin string, offset int64, err error) {
	switch origin = r.query.Get("origin"); origin {
	case "":
		origin = "start"
	case "start", "end":
	default:
		return "", 0, badRequest("invalid origin %q: use start or end", origin)
	}
	offset, err = r.number("offset", 0)
	if err == nil && offset < 0 {
		err = badRequest("offset must not be negative")
	}
	return origin, offset, err
}

// file calls the node about a file of the allocation that the route names.
func (s *Server) file(r *request, req FileRequest) (Frames, error) {
	req.AllocID, req.Path = r.params["id"], r.query.Get("path")
	if req.Path == "" {
		if req.Op == "read" || req.Op == "stream" {
			return nil, badRequest("must provide a file name")
		}
		req.Path = "/"
	}
	a, err := s.allocOf(r)
	if err != nil {
		return nil, err
	}
	return s.cfg.Nodes.File(r.Context(), a.NodeID, req)
}

// one gives an answer of one frame of JSON.
func one(frames Frames) (any, error) {
	defer frames.Close()
	f, err := frames.Next()
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = cluster.Errorf(cluster.CodeInternal, "the node ended its answer without data")
		}
		return nil, err
	}
	return json.RawMessage(f.Data), nil
}

func (s *Server) statFile(r *request) (any, error) {
	frames, err := s.file(r, FileRequest{Op: "stat"})
	if err != nil {
		return nil, err
	}
	return one(frames)
}

func (s *Server) listFiles(r *request) (any, error) {
	frames, err := s.file(r, FileRequest{Op: "ls"})
	if err != nil {
		return nil, err
	}
	return one(frames)
}

func (s *Server) catFile(r *request) (any, error) {
	frames, err := s.file(r, FileRequest{Op: "read", Origin: "start", Limit: -1})
	if err != nil {
		return nil, err
	}
	return raw(frames, ""), nil
}

func (s *Server) readFileAt(r *request) (any, error) {
	if r.query.Get("offset") == "" {
		return nil, badRequest("must provide an offset")
	}
	offset, err := r.number("offset", 0)
	if err != nil {
		return nil, err
	}
	limit, err := r.number("limit", -1)
	if err != nil {
		return nil, err
	}
	frames, err := s.file(r, FileRequest{Op: "read", Origin: "start", Offset: offset, Limit: limit})
	if err != nil {
		return nil, err
	}
	return raw(frames, ""), nil
}

func (s *Server) streamFile(r *request) (any, error) {
	follow := true
	var err error
	if r.query.Has("follow") {
		if follow, err = r.flag("follow", true); err != nil {
			return nil, err
		}
	}
	req := FileRequest{Op: "stream", Follow: follow, Limit: -1}
	if req.Origin, req.Offset, err = r.offset(); err != nil {
		return nil, err
	}
	frames, err := s.file(r, req)
	if err != nil {
		return nil, err
	}
	return framed(r.Context(), frames, "application/json"), nil
}

// raw streams the bytes of frames. Files are somebody else's: a browser must show
// them as nothing but text. contentType "" looks at the first bytes.
func raw(frames Frames, contentType string) streamFunc {
	return func(w http.ResponseWriter) error {
		defer frames.Close()
		begun := false
		begin := func(data []byte) {
			if begun {
				return
			}
			begun = true
			if contentType == "" {
				contentType = "text/plain; charset=utf-8"
				if !utf8.Valid(data) {
					contentType = "application/octet-stream"
				}
			}
			h := w.Header()
			h.Set("Content-Type", contentType)
			h.Set("X-Content-Type-Options", "nosniff")
			h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; sandbox")
			w.WriteHeader(http.StatusOK)
		}
		for {
			f, err := frames.Next()
			if errors.Is(err, io.EOF) {
				begin(nil)
				return nil
			}
			if err != nil {
				return err
			}
			begin(f.Data)
			if _, err := w.Write(f.Data); err != nil {
				return err
			}
			flush(w)
		}
	}
}

func flush(w http.ResponseWriter) {
	_ = http.NewResponseController(w).Flush() // a writer that cannot flush sends in its own time
}

// wireFrame is a Frame as clients read it; an empty one is a heartbeat.
type wireFrame struct {
	Offset    int64  `json:",omitempty"`
	Data      []byte `json:",omitempty"`
	File      string `json:",omitempty"`
	FileEvent string `json:",omitempty"`
}

// next is what one call of Frames.Next gave.
type next struct {
	frame Frame
	err   error
}

// framed streams frames as JSON objects one after the other, with a heartbeat
// each second.
func framed(ctx context.Context, frames Frames, contentType string) streamFunc {
	return func(w http.ResponseWriter) error {
		ctx, cancel := context.WithCancel(ctx)
		incoming, ended := make(chan next), make(chan struct{})
		go func() {
			defer close(ended)
			for {
				f, err := frames.Next()
				select {
				case incoming <- next{f, err}:
				case <-ctx.Done():
					return
				}
				if err != nil {
					return
				}
			}
		}()
		defer func() {
			cancel()
			frames.Close()
			<-ended
		}()
		beat := time.NewTimer(firstBeat)
		defer beat.Stop()
		first := true
		for {
			var out []wireFrame
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-beat.C:
				out = []wireFrame{{}}
				beat.Reset(heartbeat)
			case n := <-incoming:
				if n.err != nil && !errors.Is(n.err, io.EOF) {
					return n.err
				}
				if n.err == nil {
					out = split(n.frame)
				}
				if n.err != nil && !first {
					return nil
				}
				if n.err != nil { // nothing came at all
					w.Header().Set("Content-Type", contentType)
					w.WriteHeader(http.StatusOK)
					return nil
				}
			}
			if first {
				w.Header().Set("Content-Type", contentType)
				first = false
			}
			for _, f := range out {
				b, err := json.Marshal(f)
				if err != nil {
					return err
				}
				if _, err := w.Write(b); err != nil {
					return err
				}
			}
			flush(w)
		}
	}
}

// split cuts a frame into those of at most maxFrame bytes.
func split(f Frame) []wireFrame {
	var out []wireFrame
	start := f.Offset - int64(len(f.Data))
	for len(f.Data) > maxFrame {
		start += maxFrame
		out = append(out, wireFrame{Offset: start, Data: f.Data[:maxFrame], File: f.File})
		f.Data = f.Data[maxFrame:]
	}
	return append(out, wireFrame{Offset: f.Offset, Data: f.Data, File: f.File, FileEvent: f.FileEvent})
}

func (s *Server) nodeStats(r *request) (any, error) {
	id := r.query.Get("node_id")
	switch {
	case id == "":
		return nil, badRequest("must provide node_id: servers run no allocations themselves")
	case s.cfg.Nodes == nil:
		return nil, notBuilt("this server has no way to nodes")
	}
	if err := s.fresh(r); err != nil {
		return nil, err
	}
	if s.cfg.Store.State().Snapshot().Node(nil, id) == nil {
		return nil, notFound("Unknown node %s", id)
	}
	return s.cfg.Nodes.NodeStats(r.Context(), id)
}

func (s *Server) allocStats(r *request) (any, error) {
	a, err := s.allocOf(r)
	if err != nil {
		return nil, err
	}
	return s.cfg.Nodes.AllocStats(r.Context(), a.NodeID, a.ID, r.query.Get("task"))
}

// allocChecks answers what the checks of an allocation's services have come to.
func (s *Server) allocChecks(r *request) (any, error) {
	a, err := s.allocOf(r)
	if err != nil {
		return nil, err
	}
	if j := s.cfg.Store.State().Snapshot().JobVersion(nil, a.JobKey(), a.JobVersion); j == nil || j.Group(a.TaskGroup) == nil || len(j.Group(a.TaskGroup).AllServices()) == 0 {
		return struct{}{}, nil // its node need not be asked
	}
	return s.cfg.Nodes.Checks(r.Context(), a.NodeID, a.ID)
}

// done is the answer to calls that change something on a node.
type done struct{ Index uint64 }

func (s *Server) restartAlloc(r *request) (any, error) {
	var req struct {
		TaskName string
		AllTasks bool
	}
	if err := r.decode(&req); err != nil && !errors.Is(err, errEmpty) {
		return nil, err
	}
	if req.TaskName != "" && req.AllTasks {
		return nil, badRequest("cannot set both a task name and all tasks")
	}
	a, err := s.allocOf(r)
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Nodes.Restart(r.Context(), a.NodeID, RestartRequest{AllocID: a.ID, Task: req.TaskName, AllTasks: req.AllTasks}); err != nil {
		return nil, onNode(err)
	}
	return done{}, nil
}

func (s *Server) signalAlloc(r *request) (any, error) {
	var req struct{ Task, Signal string }
	if err := r.decode(&req); err != nil {
		return nil, err
	}
	a, err := s.allocOf(r)
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Nodes.Signal(r.Context(), a.NodeID, SignalRequest{AllocID: a.ID, Task: req.Task, Signal: req.Signal}); err != nil {
		return nil, onNode(err)
	}
	return done{}, nil
}

// onNode gives a node's refusal (a task that does not run, an unknown signal) the
// status that Nomad has for it.
func onNode(err error) error {
	if cluster.CodeOf(err) == cluster.CodeNotFound {
		return err
	}
	return refused(err)
}

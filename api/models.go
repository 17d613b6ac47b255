package api

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	"github.com/rxvision/rxvision/acl"
	"github.com/rxvision/rxvision/cluster"
)

// ModelInfo is a model with its versions, newest first.
type ModelInfo struct {
	cluster.Model
	Versions []*cluster.ModelVersion
}

func (s *Server) listModels(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		models := only(snap.Models(ws), func(m *cluster.Model) bool {
			return hasPrefix(m.Name, r.prefix) && r.may(acl.ModelRead, "", m.Name)
		})
		same := func(m *cluster.Model) any { return m }
		return page(r, snap.Index(ws, cluster.TableModels), models, true, func(m *cluster.Model) position { return named(m.Name) }, same, same)
	})
}

func (s *Server) readModel(r *request) (any, error) {
	name := r.params["model"]
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		m := snap.Model(ws, name)
		if m == nil {
			return missing(snap, ws, cluster.TableModels, fmt.Sprintf("model %q is not registered", name))
		}
		return found{body: &ModelInfo{*m, snap.ModelVersions(ws, name)}, index: m.ModifyIndex}
	})
}

func (s *Server) readModelVersion(r *request) (any, error) {
	name := r.params["model"]
	version, err := strconv.ParseUint(r.params["version"], 10, 64)
	if err != nil {
		return nil, badRequest("%q is no model version: use a whole number", r.params["version"])
	}
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		v := snap.ModelVersion(ws, name, version)
		if v == nil {
			return missing(snap, ws, cluster.TableModelVersions, fmt.Sprintf("model %q has no version %d", name, version))
		}
		return found{body: v, index: v.ModifyIndex}
	})
}

func (s *Server) models() (Models, error) {
	if s.cfg.Models == nil {
		return nil, notBuilt("this server has no model registry")
	}
	return s.cfg.Models, nil
}

func (s *Server) pushModel(r *request) (any, error) {
	models, err := s.models()
	if err != nil {
		return nil, err
	}
	if err := cluster.ValidModelName(r.params["model"]); err != nil {
		return nil, err
	}
	if err := s.fresh(r); err != nil {
		return nil, err
	}
	origin, err := s.origin(r)
	if err != nil {
		return nil, err
	}
	v, err := models.Push(r.Context(), r.params["model"], r.query.Get("description"), origin, r.upload())
	if err != nil {
		return nil, err
	}
	return &answer{body: v, index: v.ModifyIndex}, nil
}

// origin is the work that made a model, by the query's alloc or job; nil for none.
func (s *Server) origin(r *request) (*cluster.ModelOrigin, error) {
	o := &cluster.ModelOrigin{Namespace: r.namespace, JobID: r.query.Get("job"), AllocID: r.query.Get("alloc")}
	if o.JobID == "" && o.AllocID == "" {
		return nil, nil
	}
	if !r.may(acl.ReadJob, r.namespace, "") {
		return nil, cluster.Errorf(cluster.CodeForbidden, "Permission denied: to name the work that made a model needs %s in namespace %q", acl.ReadJob, r.namespace)
	}
	return o, s.cfg.Store.State().Snapshot().CheckOrigin(*o)
}

func (s *Server) setAlias(r *request) (any, error) {
	var req struct{ Version uint64 }
	if err := r.decode(&req); err != nil {
		return nil, err
	}
	if req.Version == 0 {
		return nil, badRequest("Version must be a version of the model; to remove an alias use DELETE")
	}
	return s.moveAlias(r, req.Version)
}

func (s *Server) deleteAlias(r *request) (any, error) { return s.moveAlias(r, 0) }

func (s *Server) moveAlias(r *request, version uint64) (any, error) {
	models, err := s.models()
	if err != nil {
		return nil, err
	}
	name := r.params["model"]
	if err := models.SetAlias(r.Context(), name, r.params["alias"], version); err != nil {
		return nil, err
	}
	m := s.cfg.Store.State().Snapshot().Model(nil, name)
	if m == nil {
		return nil, notFound("model %q is not registered", name)
	}
	return &answer{body: m, index: m.ModifyIndex}, nil
}

// readArtifact gives the bytes of an artifact, or one range of them.
func (s *Server) readArtifact(r *request) (any, error) {
	models, err := s.models()
	if err != nil {
		return nil, err
	}
	digest := r.params["digest"]
	etag := `"` + digest + `"`
	body, size, err := models.Open(r.Context(), digest, 0)
	if err != nil {
		return nil, err
	}
	start, length, partial, ok := byteRange(r.Header.Get("Range"), size)
	if match := r.Header.Get("If-Range"); match != "" && match != etag {
		start, length, partial, ok = 0, size, false, true
	}
	if start > 0 || !ok {
		if err := body.Close(); err != nil {
			return nil, err
		}
	}
	if !ok {
		return nil, errRange(size)
	}
	if start > 0 {
		if body, _, err = models.Open(r.Context(), digest, start); err != nil {
			return nil, err
		}
	}
	return streamFunc(func(w http.ResponseWriter) error {
		defer body.Close()
		h := w.Header()
		h.Set("Content-Type", "application/octet-stream")
		h.Set("Content-Length", strconv.FormatInt(length, 10))
		h.Set("Accept-Ranges", "bytes")
		h.Set("ETag", etag)
		h.Set("Cache-Control", "immutable, max-age=31536000")
		status := http.StatusOK
		if partial {
			status = http.StatusPartialContent
			h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", start, start+length-1, size))
		}
		w.WriteHeader(status)
		n, err := io.CopyN(w, body, length)
		if errors.Is(err, io.EOF) {
			return fmt.Errorf("artifact %s ended after %d of %d bytes", digest, start+n, size)
		}
		return err
	}), nil
}

// byteRange reads a Range header (RFC 9110 §14). Headers of several ranges and
// those that make no sense ask for the whole; ok is false when the range begins
// behind the end.
func byteRange(header string, size int64) (start, length int64, partial, ok bool) {
	whole := func() (int64, int64, bool, bool) { return 0, size, false, true }
	spec, found := strings.CutPrefix(header, "bytes=")
	from, to, dash := strings.Cut(spec, "-")
	if !found || !dash || strings.Contains(spec, ",") {
		return whole()
	}
	first, err1 := strconv.ParseInt(from, 10, 64)
	last, err2 := strconv.ParseInt(to, 10, 64)
	switch {
	case from == "" && err2 == nil && last > 0: // the last bytes
		last = min(last, size)
		return size - last, last, size > 0, size > 0
	case err1 != nil || first < 0 || to != "" && (err2 != nil || last < first):
		return whole()
	case first >= size:
		return 0, 0, false, false
	case to == "" || last >= size:
		last = size - 1
	}
	return first, last - first + 1, true, true
}

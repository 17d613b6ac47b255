package api

import (
	"cmp"
	"context"
	"crypto/rand"
	"net/http"
	"time"

	"github.com/rxvision/rxvision/acl"
	"github.com/rxvision/rxvision/cluster"
)

// DefaultIntroTTL is how long an introduction token lives when none says so.
const DefaultIntroTTL = time.Hour

// introPrefix begins every secret, so that people and scanners know one.
const introPrefix = "rxi-"

// IntroRequest asks for an introduction token.
type IntroRequest struct {
	Role     string // node, the default, or gateway
	NodeName string // of the one node that may use it; "": any
	TTL      string // as 90m; default 1h, at most 30 days
	Uses     *int   // default 1; 0: any number of times
	Replace  bool   // may enrol who is enrolled already, with another key
}

// IntroToken is an introduction token as clients see it.
type IntroToken struct {
	ID                       string
	Secret                   string `json:",omitempty"` // once, in the answer that made it
	Role, NodeName           string
	Replace                  bool
	Uses, Used               int
	CreateTime, ExpiresTime  int64 // unix nanoseconds
	CreateIndex, ModifyIndex uint64
}

func introToken(t *cluster.IntroToken) *IntroToken {
	return &IntroToken{
		ID: t.ID, Role: t.Role, NodeName: t.NodeName, Replace: t.Replace, Uses: t.Uses, Used: t.Used,
		CreateTime: t.CreateTime, ExpiresTime: t.ExpiresTime, CreateIndex: t.CreateIndex, ModifyIndex: t.ModifyIndex,
	}
}

func (s *Server) createIntroToken(r *request) (any, error) {
	var req IntroRequest
	if err := r.decode(&req); err != nil {
		return nil, err
	}
	ttl := DefaultIntroTTL
	if req.TTL != "" {
		var err error
		if ttl, err = time.ParseDuration(req.TTL); err != nil {
			return nil, badRequest("TTL %q is no duration: use a form like 90m or 24h", req.TTL)
		}
	}
	if ttl <= 0 || ttl > cluster.MaxIntroTTL {
		return nil, badRequest("TTL %s: expected more than 0 and at most %s", ttl, time.Duration(cluster.MaxIntroTTL))
	}
	token := &cluster.IntroToken{
		ID: newID(), Role: cmp.Or(req.Role, cluster.RoleNode), NodeName: req.NodeName, Replace: req.Replace, Uses: 1,
		ExpiresTime: time.Now().Add(ttl).UnixNano(),
	}
	if req.Uses != nil {
		token.Uses = *req.Uses
	}
	secret := introPrefix + rand.Text()
	token.SecretHash = acl.HashSecret(secret)
	res, err := s.cfg.Store.Apply(r.Context(), &cluster.CreateIntroToken{Token: token})
	if err != nil {
		return nil, err
	}
	token.CreateTime, token.CreateIndex, token.ModifyIndex = time.Now().UnixNano(), res.Index, res.Index
	out := introToken(token)
	out.Secret = secret
	return &answer{body: out, index: res.Index}, nil
}

func (s *Server) listIntroTokens(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		now := time.Now().UnixNano()
		list := only(snap.IntroTokens(ws, r.prefix), func(t *cluster.IntroToken) bool { return !t.Expired(now) })
		show := func(t *cluster.IntroToken) any { return introToken(t) }
		return page(r, snap.Index(ws, cluster.TableIntroTokens), list, true, func(t *cluster.IntroToken) position { return named(t.ID) }, show, show)
	})
}

func (s *Server) deleteIntroToken(r *request) (any, error) {
	res, err := s.cfg.Store.Apply(r.Context(), &cluster.DeleteIntroTokens{IDs: []string{r.params["id"]}})
	if err != nil {
		return nil, err
	}
	return &answer{index: res.Index}, nil
}

func (s *Server) listEnrollments(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		list := only(snap.Enrollments(ws, ""), func(e *cluster.Enrollment) bool { return hasPrefix(e.Name, r.prefix) })
		same := func(e *cluster.Enrollment) any { return e }
		return page(r, snap.Index(ws, cluster.TableEnrollments), list, true, func(e *cluster.Enrollment) position { return named(e.Role, e.Name) }, same, same)
	})
}

func (s *Server) deleteEnrollment(r *request) (any, error) {
	key := cluster.EnrollmentKey{Role: r.params["role"], Name: r.params["name"]}
	res, err := s.cfg.Store.Apply(r.Context(), &cluster.DeleteIntroTokens{Enrollments: []cluster.EnrollmentKey{key}})
	if err != nil {
		return nil, err
	}
	return &answer{index: res.Index}, nil
}

// CreateIntroToken makes an introduction token; its Secret is never shown again.
func (c *Client) CreateIntroToken(ctx context.Context, req *IntroRequest) (*IntroToken, error) {
	out := new(IntroToken)
	if err := c.call(ctx, http.MethodPut, []string{"intro-tokens"}, req, out); err != nil {
		return nil, err
	}
	return out, nil
}

// IntroTokens lists the introduction tokens that have not expired.
func (c *Client) IntroTokens(ctx context.Context) ([]*IntroToken, error) {
	var out []*IntroToken
	return out, c.call(ctx, http.MethodGet, []string{"intro-tokens"}, nil, &out)
}

// DeleteIntroToken forgets a token: nobody can enrol with it any more.
func (c *Client) DeleteIntroToken(ctx context.Context, id string) error {
	return c.call(ctx, http.MethodDelete, []string{"intro-token", id}, nil, nil)
}

// Enrollments lists the nodes and gateways that hold certificates.
func (c *Client) Enrollments(ctx context.Context) ([]*cluster.Enrollment, error) {
	var out []*cluster.Enrollment
	return out, c.call(ctx, http.MethodGet, []string{"enrollments"}, nil, &out)
}

// DeleteEnrollment cuts a node or gateway off: its certificates are worth nothing
// to servers any more, and it can renew none.
func (c *Client) DeleteEnrollment(ctx context.Context, role, name string) error {
	return c.call(ctx, http.MethodDelete, []string{"enrollment", role, name}, nil, nil)
}

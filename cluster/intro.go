package cluster

// Tables of introduction.
const (
	TableIntroTokens = "intro_tokens"
	TableEnrollments = "enrollments"
)

// Bounds of introduction.
const (
	// MaxIntroTokens bounds the tokens that have not expired.
	MaxIntroTokens = 10_000
	// MaxIntroTTL bounds how long a token lives, in nanoseconds: 30 days.
	MaxIntroTTL = 30 * 24 * 3600 * 1_000_000_000
	// MaxIntroUses bounds how many uses a token may name.
	MaxIntroUses = MaxNodes
	// MaxEnrollments bounds nodes and gateways that hold certificates.
	MaxEnrollments = 2 * MaxNodes
	// KeepEnrollment is how long the enrolment of a node stays that was collected
	// because it was down, in nanoseconds: 30 days. Until then it may come back
	// without another introduction.
	KeepEnrollment = 30 * 24 * 3600 * 1_000_000_000
	// maxReapedEnrollments bounds what one command forgets of them.
	maxReapedEnrollments = 1000
)

// Roles that a token can introduce.
const (
	RoleNode    = "node"
	RoleGateway = "gateway"
)

// IntroToken lets nodes or gateways that hold its secret enrol. The secret itself
// is not kept: log, state and snapshots hold its SHA-256 only. A token that is used
// up stays until it expires, so that a retried enrolment finds it.
type IntroToken struct {
	ID          string // UUID, public
	SecretHash  string // SHA-256 of the secret, 64 hex digits
	Role        string // node or gateway
	NodeName    string // of the one node that may use it; "": any
	Replace     bool   // may enrol who is enrolled already, with another key
	Uses        int    // how often it can be used; 0: any number of times
	Used        int
	ExpiresTime int64 // unix nanoseconds
	CreateTime  int64 // unix nanoseconds
	CreateIndex uint64
	ModifyIndex uint64
}

// Expired says whether the token was to end by now (unix nanoseconds).
func (t *IntroToken) Expired(now int64) bool { return t.ExpiresTime <= now }

// Enrollment binds a node ID or the name of a gateway to the key of its
// certificates. It begins with an introduction token and ends when the node is
// purged, or the enrolment deleted; then certificates for it are worth nothing.
type Enrollment struct {
	Role        string
	Name        string // node ID, or a gateway's name
	NodeName    string // that the token named; the node must keep to it
	KeyHash     string // SHA-256 of the public key (SubjectPublicKeyInfo), 64 hex digits
	TokenID     string // the token that was used
	AbsentTime  int64  // when the node was collected because it was down, unix nanoseconds; 0: it was not
	CreateTime  int64  // unix nanoseconds
	CreateIndex uint64
	ModifyIndex uint64
}

// EnrollmentKey names an enrolment.
type EnrollmentKey struct{ Role, Name string }

// CreateIntroToken adds a token and forgets those that have expired.
type CreateIntroToken struct {
	Stamp
	Token *IntroToken
}

// UseIntroToken enrols a node or gateway with a key. The same again, with the same
// token, changes nothing and costs no use.
type UseIntroToken struct {
	Stamp
	SecretHash string
	Role, Name string
	NodeName   string
	KeyHash    string
}

// DeleteIntroTokens forgets tokens and enrolments; an unknown one refuses the command.
type DeleteIntroTokens struct {
	Stamp
	IDs         []string
	Enrollments []EnrollmentKey
}

func (*CreateIntroToken) kind() Kind  { return KindCreateIntroToken }
func (*UseIntroToken) kind() Kind     { return KindUseIntroToken }
func (*DeleteIntroTokens) kind() Kind { return KindDeleteIntroTokens }

var introTokenTable = &Table{
	Name: TableIntroTokens, Record: 204, New: func() any { return new(IntroToken) },
	key: func(v any) string { return v.(*IntroToken).ID },
	by: map[string]func(any) string{
		"secret": func(v any) string { return v.(*IntroToken).SecretHash },
	},
}

var enrollmentTable = &Table{
	Name: TableEnrollments, Record: 207, New: func() any { return new(Enrollment) },
	key: func(v any) string { e := v.(*Enrollment); return e.Role + sep + e.Name },
	by: map[string]func(any) string{
		"absent": func(v any) string {
			if e := v.(*Enrollment); e.AbsentTime != 0 {
				return seq(uint64(e.AbsentTime))
			}
			return ""
		},
	},
}

// IntroToken returns a token by its whole ID.
func (s *Snapshot) IntroToken(ws WatchSet, id string) *IntroToken {
	return first[IntroToken](s.txn, ws, TableIntroTokens, "id", id)
}

// IntroTokenBySecret returns a token by the hash of its secret.
func (s *Snapshot) IntroTokenBySecret(ws WatchSet, hash string) *IntroToken {
	return first[IntroToken](s.txn, ws, TableIntroTokens, "secret", hash)
}

// IntroTokens returns the tokens whose ID begins with prefix, by ID.
func (s *Snapshot) IntroTokens(ws WatchSet, prefix string) []*IntroToken {
	return list[IntroToken](s.txn, ws, TableIntroTokens, "id_prefix", prefix)
}

// Enrollment returns the enrolment of a node or gateway.
func (s *Snapshot) Enrollment(ws WatchSet, k EnrollmentKey) *Enrollment {
	return first[Enrollment](s.txn, ws, TableEnrollments, "id", k.Role, k.Name)
}

// EnrolledAs says why a node of this ID and name may not act with this key, nil
// when it may.
func (s *Snapshot) EnrolledAs(nodeID, name, keyHash string) *Error {
	switch e := s.Enrollment(nil, EnrollmentKey{RoleNode, nodeID}); {
	case e == nil:
		return Errorf(CodeForbidden, "node %s is not enrolled: it was purged, or the state is older than its enrolment; enrol it with a new introduction token", nodeID)
	case e.KeyHash != keyHash:
		return Errorf(CodeForbidden, "node %s is enrolled with another key", nodeID)
	case e.NodeName != "" && e.NodeName != name:
		return Errorf(CodeForbidden, "node %s was introduced as %q and may not call itself %q", nodeID, e.NodeName, name)
	}
	return nil
}

// Enrollments returns the enrolments of a role, "" for all, by role and name.
func (s *Snapshot) Enrollments(ws WatchSet, role string) []*Enrollment {
	if role == "" {
		return list[Enrollment](s.txn, ws, TableEnrollments, "id_prefix", "")
	}
	return list[Enrollment](s.txn, ws, TableEnrollments, "id_prefix", role, "")
}

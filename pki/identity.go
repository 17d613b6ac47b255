package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Role is what the holder of a certificate is to others.
type Role string

// The roles.
const (
	RoleServer   Role = "server"   // a peer of the region, the only role on the Raft port
	RoleNode     Role = "node"     // an agent; Name is its node ID
	RoleGateway  Role = "gateway"  // an inference front door
	RoleWorker   Role = "worker"   // a model server; Name is its allocation's ID
	RoleOperator Role = "operator" // a person or a program that calls the HTTP API
)

// Roles lists all roles.
var Roles = []Role{RoleServer, RoleNode, RoleGateway, RoleWorker, RoleOperator}

// nodeRoles are what a node CA may sign.
var nodeRoles = []Role{RoleNode, RoleWorker, RoleGateway}

// MaxName bounds a name, in bytes.
const MaxName = 128

var (
	regionRe = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	nameRe   = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,127}$`)
)

// domain ends the host of every identity's URI.
const domain = "rxvision"

// Identity is who the holder of a certificate is.
type Identity struct {
	Role   Role
	Region string // one DNS label in lower case
	Name   string // unique among the role's: a server's or gateway's name, a node's or allocation's ID
}

// Check reports everything that is wrong with the identity.
func (id Identity) Check() error {
	var faults []error
	if !slices.Contains(Roles, id.Role) {
		faults = append(faults, fmt.Errorf("role %q is not known: use one of %s", id.Role, roleList(Roles)))
	}
	if err := CheckRegion(id.Region); err != nil {
		faults = append(faults, err)
	}
	if !nameRe.MatchString(id.Name) {
		faults = append(faults, fmt.Errorf("name %.140q: use 1 to %d letters, digits, '.', '_', '-', first a letter or digit", id.Name, MaxName))
	}
	return errors.Join(faults...)
}

// CheckRegion says what is wrong with a region's name, nil when a certificate can carry it.
func CheckRegion(region string) error {
	if !regionRe.MatchString(region) {
		return fmt.Errorf("region %.80q: with TLS a region is one DNS label: 1 to 63 of a-z, 0-9 and '-'", region)
	}
	return nil
}

// host is the identity's without the name: what name constraints restrict.
func host(role Role, region string) string { return string(role) + "." + region + "." + domain }

// URI is the identity as a certificate carries it.
func (id Identity) URI() *url.URL {
	return &url.URL{Scheme: "spiffe", Host: host(id.Role, id.Region), Path: "/" + id.Name}
}

// String renders the identity for logs and errors.
func (id Identity) String() string {
	return fmt.Sprintf("%s %s of region %s", id.Role, id.Name, id.Region)
}

// ErrNoIdentity says that a certificate names nobody of this platform.
var ErrNoIdentity = errors.New("the certificate names no identity")

// IdentityOf reads the identity that a certificate names. It says nothing about whether the certificate is to be believed.
func IdentityOf(cert *x509.Certificate) (Identity, error) {
	if len(cert.URIs) != 1 {
		return Identity{}, fmt.Errorf("%w: it has %d URIs instead of one of the form spiffe://ROLE.REGION.%s/NAME", ErrNoIdentity, len(cert.URIs), domain)
	}
	u := cert.URIs[0]
	labels := strings.Split(u.Host, ".")
	if len(labels) != 3 || cert.IsCA {
		return Identity{}, fmt.Errorf("%w: %.200q is not of the form spiffe://ROLE.REGION.%s/NAME", ErrNoIdentity, u, domain)
	}
	id := Identity{Role: Role(labels[0]), Region: labels[1], Name: strings.TrimPrefix(u.Path, "/")}
	if err := id.Check(); err != nil || u.String() != id.URI().String() {
		return Identity{}, fmt.Errorf("%w: %.200q is not of the form spiffe://ROLE.REGION.%s/NAME", ErrNoIdentity, u, domain)
	}
	return id, nil
}

// PeerIdentity says who is at the other end of a connection that a configuration of this package accepted. A connection of
// any other configuration may lie. ErrNoIdentity: the peer showed no certificate.
func PeerIdentity(state tls.ConnectionState) (Identity, error) {
	if len(state.PeerCertificates) == 0 {
		return Identity{}, fmt.Errorf("%w: the peer showed none", ErrNoIdentity)
	}
	return IdentityOf(state.PeerCertificates[0])
}

// Peers says which identities may be at the other end of a connection.
type Peers struct {
	Roles []Role
	// Is further restricts them when not nil.
	Is func(Identity) error
	// Anonymous lets clients in that show no certificate.
	Anonymous bool
	// Grace is how long ago the certificate of a role may have expired.
	Grace map[Role]time.Duration
}

// Only accepts the roles, whatever the name.
func Only(roles ...Role) Peers { return Peers{Roles: roles} }

// Exactly accepts one role and name.
func Exactly(role Role, name string) Peers {
	return Peers{Roles: []Role{role}, Is: func(id Identity) error {
		if id.Name != name {
			return fmt.Errorf("it is %s, not %s", id, name)
		}
		return nil
	}}
}

func (p Peers) check(id Identity, region string) error {
	switch {
	case id.Region != region:
		return fmt.Errorf("it is %s, but this is region %s", id, region)
	case !slices.Contains(p.Roles, id.Role):
		return fmt.Errorf("it is %s, but only role %s may be there", id, roleList(p.Roles))
	case p.Is != nil:
		return p.Is(id)
	}
	return nil
}

func roleList(roles []Role) string {
	names := make([]string, len(roles))
	for i, r := range roles {
		names[i] = string(r)
	}
	return strings.Join(names, ", ")
}

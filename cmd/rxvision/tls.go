package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/rxvision/rxvision/pki"
)

const (
	day = 24 * time.Hour
	// maxDays bounds a certificate's life: TLS libraries refuse dates far away.
	maxDays = 36500

	caFile, caKeyFile         = "ca.pem", "ca-key.pem"
	nodeCAFile, nodeCAKeyFile = "node-ca.pem", "node-ca-key.pem"
)

func newTLS() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "tls",
		Short: "Make the certificates of a region",
		Long: `Makes the certificates by which servers, gateways and operators know each other.
Nodes and workers need none of these: an agent enrols with an introduction token
(rxvision node intro) and gets short-lived certificates from the servers.`,
		Example: `  rxvision tls ca create
  rxvision tls cert create -server -name s1 -additional-ip 10.0.0.1
  rxvision tls cert create -gateway -name g1 -additional-dns inference.example.com
  rxvision tls cert create -client -name alice`,
	}
	ca := &cobra.Command{Use: "ca", Short: "Make the CA of a region"}
	ca.AddCommand(newCACreate())
	node := &cobra.Command{Use: "node-ca", Short: "Make another node CA below the CA of a region"}
	node.AddCommand(newNodeCACreate())
	cert := &cobra.Command{Use: "cert", Short: "Make certificates of servers, gateways and operators"}
	cert.AddCommand(newCertCreate())
	cmd.AddCommand(ca, node, cert)
	return cmd
}

// newFile is a file to be made, with what to say about it.
type newFile struct {
	name    string
	content []byte
	mode    os.FileMode
	about   string
}

// createAll makes all of the files or none, and says what they are for.
func createAll(out io.Writer, dir string, files ...newFile) error {
	var faults []error
	for _, f := range files {
		if path := filepath.Join(dir, f.name); fileThere(path) {
			faults = append(faults, fmt.Errorf("%s exists already: it is not overwritten; move it away or choose another folder with --dir", path))
		}
	}
	if err := errors.Join(faults...); err != nil {
		return err
	}
	for i, f := range files {
		if err := pki.Create(filepath.Join(dir, f.name), f.content, f.mode); err != nil {
			for _, made := range files[:i] {
				err = errors.Join(err, os.Remove(filepath.Join(dir, made.name)))
			}
			return err
		}
	}
	for _, f := range files {
		if _, err := fmt.Fprintf(out, "==> Saved %s: %s\n", filepath.Join(dir, f.name), f.about); err != nil {
			return err
		}
	}
	return nil
}

func fileThere(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func checkDays(days int) error {
	if days < 1 || days > maxDays {
		return fmt.Errorf("--days %d: expected 1 to %d", days, maxDays)
	}
	return nil
}

func newCACreate() *cobra.Command {
	var (
		days        int
		region, dir string
	)
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Make a region's CA and its node CA",
		Long: `Makes two CAs. ca.pem signs servers, gateways and operators; keep its key,
ca-key.pem, off line. node-ca.pem, which ca.pem has signed, lets servers sign the
short-lived certificates of nodes, workers and gateways that enrol; it can sign
nothing else, so its key, node-ca-key.pem, is on every server.

Files that exist are not overwritten.`,
		Example: "  rxvision tls ca create\n  rxvision tls ca create -region eu -days 3650 -dir /etc/rxvision/tls",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var regionErr error
			if err := pki.CheckRegion(region); err != nil {
				regionErr = fmt.Errorf("--region: %w", err)
			}
			if err := errors.Join(checkDays(days), regionErr); err != nil {
				return err
			}
			life, now := time.Duration(days)*day, time.Now()
			ca, err := pki.NewCA(region, life, now)
			if err != nil {
				return err
			}
			node, err := ca.NewNodeCA(life, now)
			if err != nil {
				return err
			}
			caKey, err1 := ca.KeyPEM()
			nodeKey, err2 := node.KeyPEM()
			if err := errors.Join(err1, err2); err != nil {
				return err
			}
			return createAll(cmd.OutOrStdout(), dir,
				newFile{caKeyFile, caKey, pki.ModeKey, "the CA's key; keep it off line, it is needed for `rxvision tls cert create` only"},
				newFile{caFile, ca.CertPEM(), pki.ModeCert, fmt.Sprintf("the CA of region %s; give it to everybody", region)},
				newFile{nodeCAKeyFile, nodeKey, pki.ModeKey, "the node CA's key; for servers only"},
				newFile{nodeCAFile, node.CertPEM(), pki.ModeCert, "the node CA; for servers"},
			)
		},
	}
	f := cmd.Flags()
	f.IntVar(&days, "days", 1825, "days until both CAs expire")
	f.StringVar(&region, "region", "global", "the region")
	f.StringVar(&dir, "dir", ".", "folder to write to")
	return cmd
}

// caFlags name the CA that signs.
type caFlags struct{ cert, key, dir string }

func (c *caFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&c.cert, "ca", caFile, "the CA's certificate")
	f.StringVar(&c.key, "key", caKeyFile, "the CA's key")
	f.StringVar(&c.dir, "dir", ".", "folder to write to")
}

// load reads the CA; an error says how to come by one.
func (c *caFlags) load() (*pki.Authority, error) {
	ca, err := pki.LoadAuthority(c.cert, c.key)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("%w\nMake a CA with `rxvision tls ca create`, or name its files with --ca and --key", err)
	case err != nil:
		return nil, err
	case ca.Node:
		return nil, fmt.Errorf("--ca %s is a node CA, which servers sign with; use the region's CA, ca.pem", c.cert)
	}
	return ca, nil
}

func newNodeCACreate() *cobra.Command {
	var (
		c    caFlags
		days int
	)
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Make another node CA, for servers to sign with from now on",
		Long: `Makes a node CA below the region's CA, to replace one that expires. Put it in the
place of the old one on every server: they take it into use within seconds. Nodes,
gateways and workers get certificates of it as they renew.

What the old one has signed stays valid. When its key may have been read, replace the
region's CA: make a new one in another folder, give everybody a ca.pem that holds both
certificates, then servers and operators new certificates and servers the new node CA;
once nodes and gateways have renewed, take the old certificate out of ca.pem.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ca, err := c.load()
			if err := errors.Join(checkDays(days), err); err != nil {
				return err
			}
			node, err := ca.NewNodeCA(time.Duration(days)*day, time.Now())
			if err != nil {
				return err
			}
			key, err := node.KeyPEM()
			if err != nil {
				return err
			}
			return createAll(cmd.OutOrStdout(), c.dir,
				newFile{nodeCAKeyFile, key, pki.ModeKey, "the node CA's key; for servers only"},
				newFile{nodeCAFile, node.CertPEM(), pki.ModeCert, "the node CA; for servers"},
			)
		},
	}
	c.add(cmd)
	cmd.Flags().IntVar(&days, "days", 1825, "days until it expires; not longer than the CA")
	return cmd
}

func newCertCreate() *cobra.Command {
	var (
		c                       caFlags
		server, gateway, client bool
		name                    string
		dns, ips                []string
		days                    int
	)
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Make a certificate for a server, a gateway or an operator",
		Long: `Makes NAME.pem and NAME-key.pem, signed by the region's CA. Say whom it is for:

  -server   a server, by its name. Its certificate also carries localhost,
            127.0.0.1, ::1 and server.REGION.rxvision, for HTTPS clients such as the
            nomad CLI (NOMAD_CACERT=ca.pem); add the names and addresses by which
            yours reach it.
  -gateway  a gateway that shall not enrol by itself, or that serves HTTPS.
  -client   an operator, for servers that ask their HTTPS clients for a
            certificate (NOMAD_CLIENT_CERT, NOMAD_CLIENT_KEY).

Agents need none: see rxvision node intro.`,
		Example: `  rxvision tls cert create -server -name s1 -additional-dns s1.example.com -additional-ip 10.0.0.1
  rxvision tls cert create -client -name alice -days 30`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			role, err := chosenRole(server, gateway, client)
			faults := []error{err, checkDays(days)}
			if role == pki.RoleOperator && len(dns)+len(ips) > 0 {
				faults = append(faults, errors.New("--additional-dns and --additional-ip are for certificates that serve HTTPS: -server and -gateway"))
			}
			addresses, err := parseIPs(ips)
			faults = append(faults, err, checkDNS(dns))
			if name == "" {
				faults = append(faults, errors.New("--name is missing: a server's or gateway's name, or who the operator is"))
			}
			ca, err := c.load()
			faults = append(faults, err)
			id := pki.Identity{Role: role, Name: name}
			if ca != nil {
				id.Region = ca.Region
				if role != "" && name != "" {
					faults = append(faults, id.Check())
				}
			}
			if err := errors.Join(faults...); err != nil {
				return err
			}
			names := pki.Names{DNS: dns, IPs: addresses}
			if role == pki.RoleServer {
				names = pki.ServerNames(ca.Region, dns, addresses)
			}
			key, err := pki.NewKey()
			if err != nil {
				return err
			}
			chain, err := ca.Issue(id, names, key.Public(), time.Duration(days)*day, time.Now())
			if err != nil {
				return err
			}
			text, err := pki.EncodeKey(key)
			if err != nil {
				return err
			}
			return createAll(cmd.OutOrStdout(), c.dir,
				newFile{name + "-key.pem", text, pki.ModeKey, "its key; nobody else's to read"},
				newFile{name + ".pem", pki.EncodeChain(chain), pki.ModeCert, "the certificate of " + id.String()},
			)
		},
	}
	c.add(cmd)
	f := cmd.Flags()
	f.BoolVar(&server, "server", false, "for a server")
	f.BoolVar(&gateway, "gateway", false, "for a gateway")
	f.BoolVar(&client, "client", false, "for an operator")
	f.StringVar(&name, "name", "", "whose certificate it is; also the name of the files")
	f.StringSliceVar(&dns, "additional-dns", nil, "a DNS name that HTTPS clients use; may be given several times")
	f.StringSliceVar(&ips, "additional-ip", nil, "an address that HTTPS clients use; may be given several times")
	f.IntVar(&days, "days", 365, "days until it expires; not longer than the CA")
	return cmd
}

func chosenRole(server, gateway, client bool) (role pki.Role, err error) {
	chosen := 0
	for r, is := range map[pki.Role]bool{pki.RoleServer: server, pki.RoleGateway: gateway, pki.RoleOperator: client} {
		if is {
			role, chosen = r, chosen+1
		}
	}
	if chosen != 1 {
		return "", errors.New("say whom the certificate is for by exactly one of --server, --gateway and --client; agents enrol with a token of `rxvision node intro` instead")
	}
	return role, nil
}

func parseIPs(texts []string) (ips []net.IP, err error) {
	var faults []error
	for _, s := range texts {
		ip := net.ParseIP(s)
		if ip == nil {
			faults = append(faults, fmt.Errorf("--additional-ip %q is no IP address", s))
		}
		ips = append(ips, ip)
	}
	return ips, errors.Join(faults...)
}

func checkDNS(names []string) error {
	var faults []error
	for _, n := range names {
		bad := n == "" || len(n) > 253 || strings.ContainsFunc(n, func(r rune) bool {
			return r != '.' && r != '-' && r != '*' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
		})
		if bad || net.ParseIP(n) != nil {
			faults = append(faults, fmt.Errorf("--additional-dns %q is no DNS name; for addresses use --additional-ip", n))
		}
	}
	return errors.Join(faults...)
}
